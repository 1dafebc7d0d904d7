"""The variational bound of exact denoisers, against their exact density and probability."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffcore.core.denoiser import DenoiserWrapper
from diffcore.core.oracle import EmpiricalDistribution
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.evaluation.likelihood.bound import variational_bound
from diffcore.objectives.variational import Variational
from diffcore.schedules import (
    Cosine,
    Discrete,
    Explicit,
    Flow,
    LogLinear,
    Trailing,
    Truncated,
    UniformLogSNR,
    Within,
)
from tests.helpers import oracles

SCHEDULES = [Cosine(), Flow(), LogLinear.ve(), Discrete()]


def exact_bits(oracle, x0):
    return -oracle.log_density(x0, oracle.process.schedule.at(math.inf)) / (2 * math.log(2))


def mean_gap(oracle, x0, **options):
    """The mean of the bound minus the exact value, and its standard error."""
    gap = variational_bound(oracle, x0, batch_size=len(x0), **options).bits - exact_bits(oracle, x0)
    return float(gap.mean()), float(gap.std()) / math.sqrt(len(x0))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_bound_is_above_the_exact_value_and_approaches_it_with_more_steps(schedule):
    oracle = oracles.mixture(oracles.process(schedule))
    x0 = oracle.sample(torch.arange(2000))
    gaps = [mean_gap(oracle, x0, steps=steps) for steps in (8, 32, 128)]
    (few, error), (more, _), (many, _) = gaps
    assert few > 6 * error
    assert more < few / 1.5
    assert -3 * error < many < more


@pytest.mark.parametrize("scaling", oracles.SCALINGS)
@pytest.mark.parametrize("steps", [2, 5])
def test_the_bound_of_normal_data_of_unit_variance_is_exact(scaling, steps):
    record = oracles.process(Truncated(Flow(scaling=scaling), -9.0, 6.0), sigma_data=1.0)
    oracle = oracles.gaussian([0.0, 0.0], torch.eye(2), record)
    gap, error = mean_gap(oracle, oracle.sample(torch.arange(4000)), steps=steps)
    assert error < 0.02
    assert abs(gap) < 4 * error


def test_the_bound_of_quantised_data_approaches_their_probability_with_the_smaller_variance():
    """Of four equally probable points, whose denoiser determines x_0 in the last steps."""
    points = torch.tensor([[0.0, 0.25], [-0.5, 1.0], [0.75, -0.25], [-1.0, -1.0]])
    oracle = EmpiricalDistribution(points, process=Process(Cosine(), shape=(2,)))
    x0, exact = points.repeat(100, 1), math.log2(4) / 2
    for bins in (9, 17):
        bounds = [
            variational_bound(oracle, x0, bins, steps=steps, variance=0.0, batch_size=400).mean
            for steps in (8, 32, 128)
        ]
        assert bounds[0] > bounds[1] > bounds[2] > exact
        assert bounds[2] < exact + 0.1
    larger = variational_bound(oracle, x0, 9, steps=128, batch_size=400)
    assert larger.mean > bounds[2] + 0.5
    assert larger.decoder.max() < 1e-6


def test_the_terms_are_divergences_of_gaussians_in_the_vp_process():
    """By torch.distributions, with the mean and the variance of Ho et al. 2020, eq. 6 and 7."""
    record = oracles.process(Discrete(), prediction="epsilon")
    oracle = oracles.mixture(record)
    x0 = oracle.sample(torch.zeros(2000, dtype=torch.int64))
    knots = (-4.0, 0.0, 3.0, math.inf)
    for v in (0.0, 0.4, 1.0):
        bound = variational_bound(
            oracle, x0, grid=Explicit(knots), steps=3, variance=v, batch_size=2000
        )
        t, mid, s, _ = (record.schedule.at(value) for value in knots)
        total = torch.zeros(2000, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for noisy, clean in ((t, mid), (mid, s)):
            eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
            x = noisy.alpha * x0 + noisy.sigma * eps
            alpha = noisy.alpha**2 / clean.alpha**2  # α_t of the paper, for a longer step
            beta, small = 1 - alpha, (1 - alpha) * clean.sigma**2 / noisy.sigma**2
            mean = [
                (clean.alpha * beta * value + alpha**0.5 * clean.sigma**2 * x) / noisy.sigma**2
                for value in (x0, oracle(x, noisy).x0)
            ]
            std = (small ** (1 - v) * beta**v) ** 0.5
            total += kl_divergence(Normal(mean[0], small**0.5), Normal(mean[1], std)).sum(1)
        prior = kl_divergence(
            Normal(t.alpha * x0, t.sigma), Normal(0, math.hypot(t.alpha * 0.5, t.sigma))
        )
        nats = 2 * math.log(2)
        assert torch.allclose(bound.prior * nats, prior.sum(1), rtol=1e-9)
        error = 5 * float(total.std()) / 2000**0.5
        assert float(bound.transitions.mean()) * nats == pytest.approx(
            float(total.mean()), abs=error
        )
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        estimate = oracle(s.alpha * x0 + s.sigma * eps, s).x0
        before = (1 - mid.alpha**2 / s.alpha**2) * s.sigma**2 / mid.sigma**2  # β̃ of mid -> s
        std = (before ** (1 - v) * s.sigma ** (2 * v)) ** 0.5
        decoder = -Normal(estimate, std).log_prob(x0).sum(1)
        error = 5 * float(decoder.std()) / 2000**0.5
        assert float(bound.decoder.mean()) * nats == pytest.approx(float(decoder.mean()), abs=error)
        assert torch.allclose(bound.bits, bound.prior + bound.transitions + bound.decoder)


def test_the_bound_is_the_same_in_every_scaling():
    """But for the prior of a schedule that ends before pure noise, whose scale depends on it."""
    levels = Truncated(Flow(), -9.0, 6.0)
    bounds = []
    for scaling in oracles.SCALINGS:
        record = oracles.process(replace(levels, inner=Flow(scaling=scaling)))
        oracle = oracles.mixture(record)
        x0 = oracle.sample(torch.arange(4))
        bounds.append(variational_bound(oracle, x0, steps=8, variance=0.5))
    for name in ("prior", "transitions", "decoder"):
        first, *others = (getattr(bound, name) for bound in bounds)
        assert all(torch.allclose(first, other, atol=1e-7) for other in others)


def test_the_steps_are_the_entries_of_a_table_by_default():
    record = oracles.process(Discrete("cosine", 20))
    oracle = oracles.mixture(record)
    x0 = oracle.sample(torch.arange(2))
    bound = variational_bound(oracle, x0)
    assert bound.evaluations == 20
    assert torch.equal(bound.bits, variational_bound(oracle, x0, steps=20).bits)


def test_the_bound_of_a_sample_does_not_depend_on_its_batch():
    oracle = oracles.mixture()
    x0 = oracle.sample(torch.arange(3))
    whole, apart = (
        variational_bound(oracle, x0, steps=4, batch_size=size, condition=torch.tensor([0, 1, 1]))
        for size in (64, 1)
    )
    assert torch.allclose(whole.bits, apart.bits, rtol=1e-9)
    other = variational_bound(oracle, x0, steps=4, seed=1)
    assert not torch.allclose(whole.bits, other.bits, rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 1}, "expected at least 2"),
        ({"grid": Within(UniformLogSNR(-8.0, 8.0), high=4.0), "steps": 4}, "the clean level"),
        ({"variance": 1.5}, "variance is 1.5, expected v within"),
        ({"bins": 256}, "not quantised"),
        ({"condition": [7, 7, 7]}, "labels .* are out of range"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    oracle = oracles.mixture()
    x0 = oracle.sample(torch.arange(3))
    with pytest.raises(ValueError, match=message):
        variational_bound(oracle, x0, **options)


def test_data_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\), stacked along the first axis"):
        variational_bound(oracles.mixture(), torch.zeros(3, 4))


class LearnedVariance(DenoiserWrapper):
    """A denoiser with another v at each element."""

    def __call__(self, x, level, condition=None):
        prediction = self.inner(x, level, condition)
        return replace(prediction, variance=torch.tensor([0.3, 0.8]).expand_as(x).to(x))


@pytest.mark.parametrize("values", [0, 17])
def test_the_bound_of_a_learned_variance_is_the_loss_that_trains_it(values):
    """But for its prior: the sum over all levels of the terms of `Variational`."""
    steps = 6
    record = oracles.process(Discrete("cosine", steps), classes=0, variance="learned")
    denoiser = LearnedVariance(oracles.mixture(record))
    x0 = torch.tensor([[0.25, -0.5], [1.0, -1.0], [0.125, 0.75]], dtype=torch.float64)
    bound = variational_bound(denoiser, x0, values or None)
    loss = Variational(1.0, steps, values)
    total = torch.zeros(3, dtype=torch.float64)
    for index, knot in enumerate(Trailing().knots(record.schedule, steps)[:-1]):
        level = record.schedule.level(torch.full((3, 1), knot.t))
        key = torch.arange(3) + (index << 32)
        truth = Prediction(x0, normal(0, Stream.BOUND, key, (2,), dtype=torch.float64))
        prediction = denoiser(truth.at(level), level)
        total += loss(record, prediction, truth, level).sum(1) / steps
    assert torch.allclose((bound.transitions + bound.decoder) * 2, total, rtol=1e-6)


def test_a_given_variance_takes_the_place_of_the_learned_one():
    oracle = oracles.mixture()
    x0 = oracle.sample(torch.arange(3))
    learned = variational_bound(LearnedVariance(oracle), x0, steps=4)
    given, fixed = (
        variational_bound(each, x0, steps=4, variance=0.5)
        for each in (LearnedVariance(oracle), oracle)
    )
    assert torch.equal(given.bits, fixed.bits)
    assert not torch.allclose(learned.bits, fixed.bits, rtol=1e-3)
