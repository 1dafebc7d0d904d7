"""Every sampler converges to the exact flow at the order that it declares."""

import importlib
import inspect
import pkgutil
from functools import cache

import pytest
import torch

import diffcore.samplers
from diffcore.noise import Noise
from diffcore.samplers import DDIM, AlphaBlending, Sampler
from diffcore.sampling import run
from diffcore.schedules import Explicit
from tests.oracles import flow, mixture
from tests.samplers.test_weak_orders import WEAK

ORDERS = {  # deterministic samplers; the stochastic ones are in WEAK
    DDIM(): 1,
    AlphaBlending(1): 1,
    AlphaBlending(2): 2,
}
ROWS, LOW, HIGH = 256, -6.0, 4.0
NOISE = Noise(torch.arange(ROWS), (2,), dtype=torch.float64)


def concrete(base):
    """The library's subclasses that can be built."""
    for module in pkgutil.iter_modules(diffcore.samplers.__path__):
        importlib.import_module(f"diffcore.samplers.{module.name}")
    found = {cls for sub in base.__subclasses__() for cls in {sub, *concrete(sub)}}
    return {cls for cls in found if cls.__module__.startswith("diffcore.samplers") and not inspect.isabstract(cls)}


@cache
def ends():
    """Points of the noisy marginal at λ = LOW, and where the exact flow takes them."""
    oracle = mixture()
    low, high = (oracle.process.schedule.at(logsnr) for logsnr in (LOW, HIGH))
    x = low.alpha * oracle.sample(torch.arange(ROWS)) + low.sigma * NOISE.start()
    return x, flow(oracle, x, low, high)


def error(sampler, steps):
    """Median over the points: one near a separatrix would spoil the mean."""
    oracle = mixture()
    grid = Explicit(tuple(LOW + (HIGH - LOW) * i / steps for i in range(steps + 1)))  # no clean knot
    x, exact = ends()
    result, _ = run(oracle, sampler, x, grid.knots(oracle.process.schedule, steps), NOISE)
    return (result - exact).norm(dim=1).median()


def test_every_sampler_is_in_a_table():
    assert concrete(Sampler) == {type(sampler) for sampler in (*ORDERS, *WEAK)}


@pytest.mark.parametrize(("sampler", "order"), ORDERS.items(), ids=str)
def test_the_measured_order_is_the_declared_one(sampler, order):
    """The slope of the finest pair of step counts whose errors are above rounding (1e-11)."""
    steps, errors = 512, error(sampler, 512)
    while errors < 1e-11:
        steps, errors = steps // 2, error(sampler, steps // 2)
    slope = torch.log2(error(sampler, steps // 2) / errors)
    assert sampler.order == order
    assert slope == pytest.approx(order, abs=0.15)
