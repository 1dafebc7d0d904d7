"""What the first steps of multistep methods cost, and the share of starts that end elsewhere."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.samplers import AdamsBashforth, AdamsMoulton, DPMSolverPP, UniPC
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.sampling.loop import integrate
from diffcore.schedules import Explicit, Within
from tests.helpers.oracles import mixture
from tests.samplers.test_orders import HIGH, LOW, NOISE, ends

REFINED = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Knots within the first step, in units of it."""


def error(sampler, steps, first=(0.0,)):
    """Median error after equal steps of λ, whose first one is divided at `first`."""
    oracle, h = mixture(), (HIGH - LOW) / steps
    offsets = [*first, *range(1, steps + 1)]
    knots = Explicit(tuple(LOW + h * i for i in offsets)).knots(
        oracle.process.schedule, len(offsets) - 1
    )
    x, exact = ends()
    result, _ = integrate(oracle, sampler, x, knots, NOISE)
    return (result - exact).norm(dim=1).median().item()


@pytest.mark.parametrize(
    "sampler", (AdamsBashforth.flow(4), AdamsBashforth.deis(3), DPMSolverPP("3M")), ids=str
)
def test_predictors_of_order_3_fall_to_order_2_at_many_steps_and_keep_it_from_a_refined_start(
    sampler,
):
    """The first steps have order 1 and 2; their error is below the others' at 20 to 80 steps."""
    plain, refined = (
        [error(sampler, n, first) for n in (40, 160, 320)] for first in ((0.0,), REFINED)
    )
    assert math.log2(plain[1] / plain[2]) < 2.6
    assert math.log2(refined[1] / refined[2]) > sampler.order - 0.15
    assert refined[0] > 0.4 * plain[0]


@pytest.mark.parametrize("sampler", (AdamsMoulton(3), UniPC(3), AdamsMoulton(2)), ids=str)
def test_correctors_keep_their_order_from_first_order_starts(sampler):
    """The corrector makes the first step one of order 2, whose local error has order 3."""
    coarse, fine = (error(sampler, n) for n in (160, 320))
    assert math.log2(coarse / fine) > min(sampler.order, 4) - 0.15


def moved_starts(seed, samplers, steps):
    """Numbers of 256 starts that end more than 0.1 rms from the end of the flow, for each sampler.

    The data are 12 Gaussians in 64 dimensions with eigenvalues from 0.5 to 5e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    means = 0.3 * torch.randn(12, 64, generator=generator, dtype=torch.float64)
    axes = [
        torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
        for _ in means
    ]
    eigenvalues = torch.logspace(math.log10(0.5), math.log10(5e-5), 64, dtype=torch.float64)
    oracle = GaussianMixture(means, torch.stack([Q * eigenvalues @ Q.T for Q in axes]))
    seeds, start = torch.arange(256), oracle.process.schedule.at(-5.4)
    noise = Noise(seeds, (64,), dtype=torch.float64)
    x = start.alpha * oracle.sample(seeds) + start.sigma * noise.start()
    grid = Within(DEFAULT_GRID, low=-5.4)

    def end(sampler, n):
        knots = grid.knots(oracle.process.schedule, n)
        return integrate(oracle, sampler, x, knots, noise)[0]

    exact = end(AdamsMoulton(3), 300)
    return [
        int(((end(sampler, steps) - exact).square().mean(1).sqrt() > 0.1).sum())
        for sampler in samplers
    ]


@pytest.mark.slow
def test_the_default_sends_the_fewest_starts_to_another_component():
    """Numbers of 1536 starts, on six mixtures."""
    others = (DPMSolverPP("2M"), AdamsBashforth.flow(2), AdamsMoulton(1), UniPC(2))
    counts = {
        steps: torch.tensor(
            [moved_starts(seed, (DEFAULT_SAMPLER, *others), steps) for seed in range(1, 7)]
        ).sum(0)
        for steps in (20, 25)
    }
    assert counts[20].tolist() == pytest.approx([1, 11, 10, 7, 4], abs=1)
    assert counts[25].tolist() == pytest.approx([0, 5, 5, 5, 1], abs=1)
    assert all(number[0] < number[1:].min() for number in counts.values())
