"""The objective estimates the integral of weight, density and error for any choice of levels."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO, MSE, MinSNR
from diffcore.schedules import (
    Beta,
    Cauchy,
    Cosine,
    Flow,
    Laplace,
    Level,
    LogLinear,
    Mode,
    Normal,
    PowerCosine,
    Rho,
    Sigmoid,
    Truncated,
)
from diffcore.schedules.distributions import Distribution
from tests.helpers import oracles
from tests.helpers.products import sampled

BOUND = 8.0
WIDE = [  # all quantile schedules; each scaling is in the list
    Cosine(),
    Cosine(1.0, 0.7, scaling="flow"),
    Flow(),
    Laplace(0.0, 1.0),
    Normal(0.0, 2.5, scaling="ve"),
    Cauchy(),
    LogLinear(-9.0, 9.5),
    Rho(),
    Sigmoid(),
    PowerCosine(0.0, 0.9, 1.5),
    Mode(),
    Beta(),
]
TRUNCATED = [Truncated(wide, -BOUND, BOUND) for wide in WIDE]
every_schedule = pytest.mark.parametrize("schedule", TRUNCATED, ids=repr)


def test_the_list_contains_every_quantile_schedule():
    assert {type(schedule) for schedule in WIDE} == {
        child for child in Distribution.__subclasses__() if child.__module__.startswith("diffcore")
    }


class Biased(nn.Module):
    """The posterior mean of x_0 plus an error g(λ): E|x̂_0 - x_0|² = s²/(1 + s² SNR) + g²."""

    mean, std = 0.3, 0.8

    def __init__(self, process: Process, level: Level) -> None:
        super().__init__()
        self.process, self.level = process, level

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self.level.alpha, self.level.sigma
        if self.process.prediction == "edm":
            x = x * (sigma**2 + alpha**2 * self.process.sigma_data**2).sqrt()
        posterior = self.mean + alpha * self.std**2 * (x - alpha * self.mean) / (
            alpha**2 * self.std**2 + sigma**2
        )
        x0 = posterior + 0.6 * (-self.level.logsnr / 2).sigmoid()
        return target(
            self.process.prediction,
            x0,
            (x - alpha * x0) / sigma,
            self.level,
            self.process.sigma_data,
        )


def expected_error(logsnr):
    """E|x̂_0 - x_0|² of `Biased` at λ."""
    s2 = Biased.std**2
    return s2 / (1 + s2 * np.exp(logsnr)) + (0.6 / (1 + np.exp(logsnr / 2))) ** 2


def estimates(objective, process, steps, state=None):
    """The mean loss of the batch of 64 samples of each step."""
    means = []
    for step in range(steps):
        key = SampleKey(11, step, torch.arange(64), 64)
        x0 = Biased.mean + Biased.std * normal(
            5, Stream.ORACLE, key.position, process.shape, dtype=torch.float64
        )
        draw = objective.draw(process, key, state=state)
        means.append(
            objective(Denoiser(Biased(process, draw.level), process), x0, None, draw).mean().item()
        )
    return np.array(means)


@pytest.mark.parametrize(
    ("schedule", "levels"), sampled(TRUNCATED, ["stratified", "independent"], count=12), ids=repr
)
def test_the_corrected_objective_is_the_same_integral_under_every_schedule(schedule, levels):
    """∫ w(λ) E|x̂_0 - x_0|² dλ over the common range, within 4 standard errors of the means."""
    prediction_type = {"vp": "v_prediction", "flow": "flow_prediction", "ve": "edm"}[
        schedule.scaling
    ]
    process = Process(schedule, prediction_type, shape=(1, 2, 2))
    means = estimates(Objective(MinSNR(), levels, corrected=True), process, 60)
    exact = integrate.quad(
        lambda v: min(math.exp(v), 5) * expected_error(v), -BOUND, BOUND, points=[math.log(5)]
    )[0]
    assert means.mean() == pytest.approx(exact, abs=4 * means.std(ddof=1) / math.sqrt(60))
    assert means.std() / math.sqrt(60) < 0.1 * exact  # a small tolerance, so the test can fail


@pytest.mark.parametrize(
    "resampler",
    [SecondMoment(bins=12, history=2, floor=0.1), LearnedSchedule(bins=12, floor=0.1)],
    ids=repr,
)
@pytest.mark.parametrize("corrected", [True, False])
def test_a_resampler_changes_no_integral(resampler, corrected):
    process = Process(Truncated(Cosine(), -BOUND, BOUND), "v_prediction", shape=(1, 2, 2))
    z = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).sin()
    states = {"logits": z, "losses": z.exp()[:, None].expand(-1, 2)}
    objective = Objective(MinSNR(), corrected=corrected, resampler=resampler)
    means = estimates(
        objective, process, 60, {name: states[name] for name in resampler.initial_state()}
    )
    mass = process.schedule.inner.cdf(BOUND) - process.schedule.inner.cdf(-BOUND)
    law = stats.hypsecant(scale=2)

    def integrand(v):
        return min(math.exp(v), 5) * expected_error(v) * (1 if corrected else law.pdf(v) / mass)

    exact = integrate.quad(integrand, -BOUND, BOUND, points=[math.log(5)])[0]
    assert means.mean() == pytest.approx(exact, abs=4 * means.std(ddof=1) / math.sqrt(60))


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Laplace(), Normal()], ids=repr)
def test_stratified_levels_lower_the_variance_of_the_loss(schedule):
    """The plain ε error in batches of 64; over 400 steps, the ratio is 3 (Laplace) to 16 (Rho).

    The rest of the variance is that of the noise.
    """
    process, prediction_type = Process(schedule, "epsilon", shape=(1, 8, 8)), "epsilon"
    independent, stratified = (
        estimates(Objective(MSE(prediction_type), levels), process, 40).var()
        for levels in ("independent", "stratified")
    )
    assert independent / stratified > (2 if schedule == Laplace() else 4)


class Fixed(Objective):
    """An objective with given times, for integration by a quadrature rule."""

    def times(self, key, state=None):
        return key.index.double()


def nodes(count):
    """The times and weights of a quadrature rule on [0, 1].

    Gauss-Legendre in x on both halves, with t = x²(3 - 2x), which is smooth where λ(t) is steep.
    """
    x, w = np.polynomial.legendre.leggauss(count)
    x, w = np.concatenate((x + 1, x + 3)) / 4, np.concatenate((w, w)) / 4
    return torch.from_numpy(x**2 * (3 - 2 * x)), torch.from_numpy(w * 6 * x * (1 - x))


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    sampled(TRUNCATED, ["epsilon", "v_prediction"], count=12),
    ids=repr,
)
def test_the_bound_of_an_exact_denoiser_is_the_same_under_every_schedule(schedule, prediction_type):
    """The invariance of VDM: ½ ∫ |ε - ε̂|² dλ of three pairs (x_0, ε), by quadrature in t and in λ.

    ε̂ is the posterior mean of a mixture.
    """
    pairs = 3
    t, w = nodes(120)
    record = oracles.process(schedule, prediction=prediction_type)
    oracle = oracles.mixture(record)
    x0, eps = (
        normal(2, Stream.ORACLE, torch.arange(pairs) + shift, (2,), dtype=torch.float64)
        for shift in (0, 9)
    )

    key = SampleKey(0, 0, t.repeat(pairs), pairs * len(t))
    draw = Fixed(ELBO(), corrected=True).draw(record, key)
    repeated, noise = x0.repeat_interleave(len(t), 0), eps.repeat_interleave(len(t), 0)
    mask = torch.zeros(len(repeated), dtype=torch.bool)

    class Network(nn.Module):
        def forward(self, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
            result = oracle(x, draw.level)
            return target(prediction_type, result.x0, result.eps, draw.level, 0.5)

    losses = Fixed(ELBO())(
        Denoiser(Network(), record),
        repeated,
        torch.zeros(len(repeated), dtype=torch.int64),
        draw._replace(noise=noise, dropout_mask=mask),
    )
    result = (losses.unflatten(0, (pairs, -1)) * w).sum(1)

    def integrand(v, pair):
        level = Cosine().at(float(v))
        x = level.alpha * x0[pair] + level.sigma * eps[pair]
        return (oracle(x[None], level).eps[0] - eps[pair]).square().mean().item() / 2

    v, dv = np.polynomial.legendre.leggauss(160)
    expected = [
        sum(BOUND * b * integrand(BOUND * a, pair) for a, b in zip(v, dv, strict=True))
        for pair in range(pairs)
    ]
    assert result.tolist() == pytest.approx(expected, rel=1e-8)
