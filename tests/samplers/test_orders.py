"""Each sampler converges to the exact flow at its declared order."""

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
    TCD,
    AdamsBashforth,
    AdamsMoulton,
    AdaptiveRungeKutta,
    AlphaBlending,
    Consistency,
    DPMSolverPP,
    Euler,
    GradientEstimation,
    Heun,
    Sampler,
    TunedMultistep,
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
    TunedMultistep(AdamsBashforth.flow(2), ((0.2,),), ((-0.2,),)): 2,  # of another number of steps
}
ADAPTIVE = {  # the tolerance accepts each step, so the steps are those of the knots
    AdaptiveRungeKutta("BogackiShampine", rtol=1e6): 3,
    AdaptiveRungeKutta("DormandPrince", rtol=1e6): 5,
}
FEW_STEP = (Consistency(), TCD())
"""Exact for any number of steps (test_consistency.py), and refused for denoisers."""
COUNT, LOW, HIGH = 256, -6.0, 4.0
SEEDED = 4
"""Knots before LOW at which a multistep method is given exact predictions: a first-order start caps
every order at 2.
"""
NOISE = Noise(torch.arange(COUNT), (2,), dtype=torch.float64)


def concrete_subclasses(base):
    """The subclasses in the library that are not abstract."""
    for module in pkgutil.iter_modules(diffcore.samplers.__path__):
        importlib.import_module(f"diffcore.samplers.{module.name}")
    subclasses = {cls for sub in base.__subclasses__() for cls in {sub, *concrete_subclasses(sub)}}
    return {
        cls
        for cls in subclasses
        if cls.__module__.startswith("diffcore.samplers") and not inspect.isabstract(cls)
    }


@cache
def ends():
    """Points of the noisy marginal at λ = LOW, and the ends of the exact flow from them."""
    oracle = mixture()
    low, high = (oracle.process.schedule.at(logsnr) for logsnr in (LOW, HIGH))
    x = low.alpha * oracle.sample(torch.arange(COUNT)) + low.sigma * NOISE.start()
    return x, flow(oracle, x, low, high)


@cache
def before(steps):
    """Knots before LOW at the same spacing, and the exact states there."""
    oracle = mixture()
    schedule, h = oracle.process.schedule, (HIGH - LOW) / steps
    levels = [schedule.at(LOW - i * h) for i in range(SEEDED, 0, -1)]
    return levels, [flow(oracle, ends()[0], schedule.at(LOW), level) for level in levels]


def error(sampler, steps):
    """Median error over the points; the mean is dominated by points near a separatrix."""
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


def test_each_sampler_has_a_declared_order_in_a_table():
    assert concrete_subclasses(Sampler) == {
        type(sampler) for sampler in (*ORDERS, *ADAPTIVE, *WEAK, *FEW_STEP)
    }


@pytest.mark.parametrize("sampler", [*ORDERS, *ADAPTIVE, *WEAK, *FEW_STEP], ids=str)
def test_an_instance_has_no_attributes_except_its_fields(sampler):
    """YAML files contain the attributes of an instance, and are read back as fields."""
    assert vars(sampler).keys() == {field.name for field in dataclasses.fields(sampler)}


@pytest.mark.parametrize(("sampler", "order"), [*ORDERS.items(), *ADAPTIVE.items()], ids=str)
def test_the_measured_order_is_the_declared_one(sampler, order):
    """The slope is that of the finest two grids with errors above 5e-13, that of the reference."""
    steps = 128 if sampler in ADAPTIVE else 256
    errors = error(sampler, steps)
    while errors < 5e-13:
        steps, errors = steps // 2, error(sampler, steps // 2)
    slope = torch.log2(error(sampler, steps // 2) / errors)
    assert sampler.order == order
    assert slope == pytest.approx(order, abs=0.15)
