"""The distribution of each stochastic sampler converges at its declared weak order.

The distribution is propagated exactly, because Monte Carlo estimates are too noisy for a slope: the
moments on a Gaussian, and an expectation by quadrature on a mixture in one dimension.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.samplers import (
    DDIM,
    DDPM,
    AlphaBlending,
    DPMSolverSDE,
    EulerAncestral,
    PredictorCorrector,
    Restart,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import Explicit
from tests.helpers.moments import Probe, moments
from tests.helpers.oracles import covariance, gaussian, process
from tests.helpers.products import thinned

INTERVALS = ((0.2, 0.8, 4, 2), (1.5, 4.0, 4, 1))
# Weak orders measured on a Gaussian. They are the declared ones, except for the midpoint rule in a,
# whose order on a Gaussian is higher by one.
WEAK = {
    DDIM(0.5): 1,
    DDIM(1.0): 1,
    DDPM(0.0): 1,
    DDPM(0.5): 1,
    DDPM(1.0): 1,
    EulerAncestral(): 1,
    AlphaBlending(1, 1.0): 1,
    AlphaBlending(2, 0.5): 3,
    AlphaBlending(2, 1.0): 3,
    DPMSolverSDE(1): 1,
    DPMSolverSDE(2): 2,
    DPMSolverSDE(2, 0.5, "heun"): 2,
    DPMSolverSDE(3): 2,
    Restart(AlphaBlending(1), INTERVALS): 1,
    Restart(DDIM(0.5), INTERVALS): 1,
    Restart(DPMSolverSDE(2, 0.0), INTERVALS): 2,
    PredictorCorrector(): 1,
    PredictorCorrector(AlphaBlending(2), 2): 1,
    PredictorCorrector(DPMSolverSDE(2), 1): 1,
}
COV = covariance(0.8, 0.2, 0.7)
ORACLE = gaussian([1.0, -0.5], COV)
EYE = torch.eye(2, dtype=torch.float64)


def knots_of(steps, low=-6.0, high=4.0):
    """Knots uniform in λ, without a clean one."""
    return Explicit(tuple(low + (high - low) * i / steps for i in range(steps + 1))).knots(
        ORACLE.process.schedule, steps
    )


def marginal(level, cov=COV):
    return level.alpha * ORACLE.means[0], level.alpha**2 * cov + level.sigma**2 * EYE


def errors(sampler, steps):
    """Errors of mean and covariance at the last knot."""
    if isinstance(sampler, Restart):  # the steps of its intervals increase with those of the grid
        sampler = replace(
            sampler, intervals=tuple((*ends, steps // 8, k) for *ends, _, k in sampler.intervals)
        )
    knots = knots_of(steps)
    propagated, exact = moments(ORACLE, sampler, knots, *marginal(knots[0])), marginal(knots[-1])
    return [(a - b).norm() for a, b in zip(propagated, exact, strict=True)]


@pytest.mark.parametrize(("sampler", "measured"), WEAK.items(), ids=str)
def test_the_mean_is_exact_and_the_covariance_converges_at_the_weak_order(sampler, measured):
    (_, coarse), (mean, fine) = errors(sampler, 80), errors(sampler, 160)
    assert sampler.order == measured - (measured == 3)
    assert torch.log2(coarse / fine) == pytest.approx(measured, abs=0.15)
    assert mean < 1e-13
    assert fine < 0.05 * COV.norm()


def test_three_predictions_have_a_smaller_error_than_two_at_the_same_weak_order():
    assert errors(DPMSolverSDE(3), 160)[1] < 0.5 * errors(DPMSolverSDE(2), 160)[1]


MEANS, SPREADS, WEIGHTS = (
    np.array([-1.0, 0.4, 1.2]),
    np.array([0.3, 0.15, 0.4]),
    np.array([0.4, 0.35, 0.25]),
)
LINE = GaussianMixture(
    *(
        torch.tensor(v, dtype=torch.float64)
        for v in (MEANS[:, None], SPREADS[:, None, None] ** 2, WEIGHTS)
    ),
    process=process(shape=(1,), classes=0),
)
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(30)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


def expected(function, level):
    """E function(x) at a level of the mixture, by quadrature about each component."""
    centers, spreads = level.alpha * MEANS, np.sqrt((level.alpha * SPREADS) ** 2 + level.sigma**2)
    values = function(centers[:, None] + spreads[:, None] * NODES)
    return float(WEIGHTS @ (values @ NODE_WEIGHTS))


def observed(x):
    return np.cos(2 * x) + x**2


def propagated_expectation(sampler, steps):
    """E observed(x) at the last knot, by the backward recursion over the steps

    f_t(x) = E f_s(step from x) = Σ w_j f_s(m(x) + c z_j)
    """
    knots, grid = knots_of(steps), np.linspace(-9, 9, 1501)
    x, function = torch.from_numpy(grid)[:, None], observed
    for t, s in reversed(list(pairwise(knots))):
        m, c = (
            integrate(LINE, sampler, x, (t, s), ConstantNoise(z, len(x)))[0][:, 0].numpy()
            for z in (0.0, 1.0)
        )
        values = function(np.clip(m[:, None] + (c - m)[:, None] * NODES, -9, 9)) @ NODE_WEIGHTS
        function = CubicSpline(grid, values)
    return expected(function, knots[0])


class ConstantNoise:
    """Noise with the same value everywhere."""

    def __init__(self, z, count):
        self.z = torch.full((count, 1), z, dtype=torch.float64)

    def between(self, t, s, step):
        return self.z


@pytest.mark.parametrize(
    "sampler", (DDIM(1.0), DDPM(1.0), AlphaBlending(2, 0.5), AlphaBlending(2, 1.0)), ids=str
)
def test_the_weak_order_on_a_mixture(sampler):
    exact = expected(observed, knots_of(1)[-1])
    coarse, fine = (abs(propagated_expectation(sampler, n) - exact) for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(sampler.order, abs=0.15)


@pytest.mark.parametrize("sampler", WEAK, ids=str)
def test_each_noise_of_a_run_has_its_own_key(sampler):
    """Keys are steps, or intervals of levels if the noise follows a path."""
    probe = Probe(1, 2)
    integrate(ORACLE, sampler, torch.zeros(1, 2, dtype=torch.float64), knots_of(8), probe)
    assert len(set(probe.keys)) == len(set(probe.intervals)) == len(probe.keys) > 0


SEEDS = Noise(torch.arange(64), (2,), dtype=torch.float64)
STRONG = (
    DDIM(1.0),
    DDPM(1.0),
    AlphaBlending(2, 1.0),
    DPMSolverSDE(2),
    PredictorCorrector(),
    Restart(AlphaBlending(2, 0.5), INTERVALS),
)


def change(sampler, noise, steps):
    """Root mean square distance between the samples of a seed at `steps` and at 2 `steps` steps."""
    level = ORACLE.process.schedule.at(-6.0)
    x = level.alpha * ORACLE.means + level.sigma * noise.start()
    ends = [integrate(ORACLE, sampler, x, knots_of(n), noise)[0] for n in (steps, 2 * steps)]
    return (ends[0] - ends[1]).square().mean().sqrt()


@pytest.mark.parametrize("sampler", thinned([(one,) for one in STRONG], count=3), ids=str)
def test_with_a_path_twice_the_steps_give_a_nearby_sample(sampler):
    """Strong convergence; without a path, the samples differ as much as those of two seeds."""
    with_path = replace(SEEDS, path=True)
    first, second = change(sampler, with_path, 20), change(sampler, with_path, 40)
    assert second < 0.7 * first
    assert second < 0.2 * change(sampler, SEEDS, 40)
