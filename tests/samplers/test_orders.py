"""Every sampler converges to the exact flow at the order that it declares."""

import dataclasses
import importlib
import inspect
import pkgutil
from functools import cache
from itertools import product

import pytest
import torch

import diffcore.samplers
from diffcore.core.noise import Noise
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AdaptiveRungeKutta,
    AlphaBlending,
    DPMSolverPP,
    Euler,
    GradientEstimation,
    Heun,
    Sampler,
    UniPC,
)
from diffcore.schedules import Explicit
from tests.helpers.oracles import flow, mixture
from tests.samplers.test_weak_orders import WEAK

ORDERS = {  # deterministic samplers; the stochastic ones are in WEAK
    DDIM(): 1,
    AlphaBlending(1): 1,
    AlphaBlending(2): 2,
    Euler(): 1,
    Heun(): 2,
    DPMSolverPP("1"): 1,
    DPMSolverPP("2S"): 2,
    DPMSolverPP("2M"): 2,
    DPMSolverPP("3M"): 3,
    DPMSolverPP("3M published"): 2,
    **{AdamsBashforth.lms(k): k for k in (1, 2, 3, 4, 5)},
    **{AdamsBashforth.flow(k): k for k in (2, 3, 4, 5)},
    **{AdamsBashforth(k, "x0", "logsnr"): k for k in (2, 3, 5)},
    **{AdamsBashforth.deis(k): k for k in (2, 3, 4)},
    AdamsBashforth.deis(2, "t"): 2,
    AdamsBashforth.deis(3, "t"): 3,
    AdamsBashforth.ipndm(2): 2,
    AdamsBashforth.ipndm(4): 2,
    **{UniPC(p, B): p + 1 for p, B in product((1, 2, 3), ("bh1", "bh2"))},
    **{AdamsMoulton(k): k + 1 for k in (1, 2, 3, 4)},
    **{AdamsMoulton(2, held, "logsnr"): 3 for held in ("eps", "x0", "velocity")},
    AdamsMoulton(2, "eps", "u"): 3,
    AdamsMoulton(3, every=2): 4,
    AdamsMoulton(3, "x0", "t"): 4,
    AdamsMoulton(3, "eps", "index"): 2,
    GradientEstimation(): 1,
    GradientEstimation(1.5): 2,
}
ADAPTIVE = {  # with a tolerance that every step meets, they step from knot to knot
    AdaptiveRungeKutta("BogackiShampine", rtol=1e6): 3,
    AdaptiveRungeKutta("DormandPrince", rtol=1e6): 5,
}
ROWS, LOW, HIGH = 256, -6.0, 4.0
SEEDED = 4
"""Knots before LOW at which a multistep method is given exact predictions: a first-order start caps
every order at 2.
"""
NOISE = Noise(torch.arange(ROWS), (2,), dtype=torch.float64)


def concrete(base):
    """The library's subclasses that can be built."""
    for module in pkgutil.iter_modules(diffcore.samplers.__path__):
        importlib.import_module(f"diffcore.samplers.{module.name}")
    found = {cls for sub in base.__subclasses__() for cls in {sub, *concrete(sub)}}
    return {
        cls
        for cls in found
        if cls.__module__.startswith("diffcore.samplers") and not inspect.isabstract(cls)
    }


@cache
def ends():
    """Points of the noisy marginal at λ = LOW, and where the exact flow takes them."""
    oracle = mixture()
    low, high = (oracle.process.schedule.at(logsnr) for logsnr in (LOW, HIGH))
    x = low.alpha * oracle.sample(torch.arange(ROWS)) + low.sigma * NOISE.start()
    return x, flow(oracle, x, low, high)


@cache
def before(steps):
    """Knots before LOW at the same distance, and exact states there."""
    oracle = mixture()
    schedule, h = oracle.process.schedule, (HIGH - LOW) / steps
    levels = [schedule.at(LOW - i * h) for i in range(SEEDED, 0, -1)]
    return levels, [flow(oracle, ends()[0], schedule.at(LOW), level) for level in levels]


def error(sampler, steps):
    """Median over the points: one near a separatrix would spoil the mean."""
    oracle = mixture()
    grid = Explicit(
        tuple(LOW + (HIGH - LOW) * i / steps for i in range(steps + 1))
    )  # no clean knot
    levels, states = before(steps)
    x, exact = ends()
    state = sampler.start(states[0], (*levels, *grid.knots(oracle.process.schedule, steps)), NOISE)
    for known in (*states, x):
        state, step = dataclasses.replace(state, x=known), state.step
        while state.step == step:
            state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    while not state.done:
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    return (state.x - exact).norm(dim=1).median()


def test_every_sampler_is_in_a_table():
    assert concrete(Sampler) == {type(sampler) for sampler in (*ORDERS, *ADAPTIVE, *WEAK)}


@pytest.mark.parametrize("sampler", [*ORDERS, *ADAPTIVE, *WEAK], ids=str)
def test_an_instance_holds_its_fields_alone(sampler):
    """So that YAML, which writes what an instance holds, reads it back."""
    assert vars(sampler).keys() == {field.name for field in dataclasses.fields(sampler)}


@pytest.mark.parametrize(("sampler", "order"), [*ORDERS.items(), *ADAPTIVE.items()], ids=str)
def test_the_measured_order_is_the_declared_one(sampler, order):
    """The slope of the finest pair of step counts whose errors are above the reference's own,
    5e-13.
    """
    steps = 128 if sampler in ADAPTIVE else 256
    errors = error(sampler, steps)
    while errors < 5e-13:
        steps, errors = steps // 2, error(sampler, steps // 2)
    slope = torch.log2(error(sampler, steps // 2) / errors)
    assert sampler.order == order
    assert slope == pytest.approx(order, abs=0.15)
