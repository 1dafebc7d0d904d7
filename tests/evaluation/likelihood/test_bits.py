"""Bits per dimension of exact denoisers, against integrals of their density."""

import math

import pytest
import torch
from scipy.stats import norm

from diffcore.core.process import Process
from diffcore.evaluation.likelihood.bits import bits_per_dimension, join_likelihoods
from diffcore.evaluation.likelihood.dequantisation import TruncatedNormal, Uniform
from diffcore.evaluation.likelihood.trace import Hutchinson
from diffcore.samplers import AdaptiveRungeKutta
from diffcore.schedules import Flow
from tests.helpers import oracles

SOLVER = AdaptiveRungeKutta(rtol=1e-4, atol=1e-4)
STD, BINS = 0.3, 9
PROCESS = Process(Flow(), shape=(2,), sigma_data=STD)
GAUSSIAN = oracles.gaussian([0.0, 0.0], STD**2 * torch.eye(2), PROCESS)
VALUES = torch.tensor([[0.0, 0.25], [-0.5, 0.0], [0.75, 1.0]])


def exact_bits(values, std):
    """Bits per dimension of the probability of the bins under N(0, std²)."""
    half, values = 1 / (BINS - 1), values.double().numpy()
    mass = norm.cdf(values + half, scale=std) - norm.cdf(values - half, scale=std)
    return -torch.from_numpy(mass).log2().mean(1)


def test_bits_of_a_density_are_its_logarithm():
    y = GAUSSIAN.sample(torch.arange(5))
    exact = -torch.distributions.Normal(0, STD).log_prob(y).sum(1) / (2 * math.log(2))
    found = bits_per_dimension(GAUSSIAN, y, solver=SOLVER)
    assert (found.bits - exact).abs().max() < 1e-3
    assert found.mean == pytest.approx(float(exact.mean()), abs=1e-3)
    assert found.standard_error == pytest.approx(float(exact.std()) / math.sqrt(5), abs=1e-3)


@pytest.mark.parametrize("rule", [Uniform(BINS), TruncatedNormal(BINS, 2.0)], ids=repr)
def test_importance_weighted_bits_fall_to_those_of_the_probability_of_the_bins(rule):
    """Which is the probability under data with the noise of the level."""
    ratio = rule.level(PROCESS).ratio
    exact = float(exact_bits(VALUES, math.hypot(STD, ratio)).mean())
    x0 = VALUES.repeat(20, 1)
    one, several = (
        bits_per_dimension(GAUSSIAN, x0, rule, draws=draws, solver=SOLVER, batch_size=60).mean
        for draws in (1, 5)
    )
    assert exact - 2e-3 < several < one
    assert several - exact < 0.5 * (one - exact) + 2e-3
    assert several == pytest.approx(exact, abs=0.03)


def test_the_bits_of_one_draw_are_the_expected_logarithm_and_the_entropy():
    """In closed form: E ln N(x_0 + e; 0, s²) of uniform e, on a bin of the width 2h."""
    x0 = torch.zeros(200, 2)
    found = bits_per_dimension(GAUSSIAN, x0, Uniform(BINS), solver=SOLVER, batch_size=200)
    half, variance = 1 / (BINS - 1), STD**2 + 1e-6
    log_p = -(half**2 / 3) / (2 * variance) - math.log(2 * math.pi * variance) / 2
    exact = -(log_p + math.log(2 * half)) / math.log(2)
    assert found.mean == pytest.approx(exact, abs=4 * found.standard_error)


def test_the_mean_over_random_vectors_is_the_exact_trace():
    oracle = oracles.mixture()
    y = oracle.sample(torch.zeros(64, dtype=torch.int64))
    exact = bits_per_dimension(oracle, y[:1], solver=SOLVER)
    found = bits_per_dimension(oracle, y, trace=Hutchinson(), solver=SOLVER)
    assert found.bits.unique().numel() > 1
    assert abs(found.mean - exact.mean) < 4 * found.standard_error
    assert math.isnan(exact.standard_error)


def test_data_with_other_values_are_refused():
    with pytest.raises(ValueError, match="use bins = 9"):
        bits_per_dimension(GAUSSIAN, VALUES, Uniform(256))


def test_data_that_would_broadcast_to_the_shape_of_the_process_are_refused():
    for rule in (None, Uniform(BINS)):
        with pytest.raises(ValueError, match=r"the data has shape \(3, 1\), expected .* \(2,\)"):
            bits_per_dimension(GAUSSIAN, VALUES[:, :1], rule)


def test_draws_need_a_dequantisation():
    with pytest.raises(ValueError, match="name a dequantisation"):
        bits_per_dimension(GAUSSIAN, VALUES, draws=2)
    with pytest.raises(ValueError, match="draws is 0"):
        bits_per_dimension(GAUSSIAN, VALUES, Uniform(BINS), draws=0)


def test_each_draw_has_noise_and_random_vectors_of_its_own(monkeypatch):
    vectors, drawn = Hutchinson.vectors, []

    def recorded(trace, size, seed, position):
        drawn.append(vectors(trace, size, seed, position))
        return drawn[-1]

    monkeypatch.setattr(Hutchinson, "vectors", recorded)
    process = Process(Flow(), shape=(8,), sigma_data=STD)
    oracle = oracles.gaussian([0.0] * 8, STD**2 * torch.eye(8), process)
    x0, options = VALUES.repeat(1, 4), {"trace": Hutchinson(), "solver": SOLVER, "seed": 3}
    first, again = (
        bits_per_dimension(oracle, x0, Uniform(BINS), draws=2, batch_size=2, **options).bits
        for _ in range(2)
    )
    assert torch.equal(first, again)
    one, other = torch.cat(drawn[:2], 1), torch.cat(drawn[2:4], 1)  # of two batches each
    assert not torch.equal(one, other)
    assert torch.equal(one, torch.cat(drawn[4:6], 1))
    single = bits_per_dimension(oracle, x0, Uniform(BINS), **options).bits
    assert not torch.allclose(first, single, atol=1e-3)


@pytest.mark.parametrize("bins", [None, BINS])
def test_parts_of_a_data_set_have_the_bits_of_the_whole(bins):
    correlated = oracles.gaussian([0.0, 0.0], oracles.covariance(0.4, 0.2, 0.7), PROCESS)

    def measure(values, size, first=0):
        return bits_per_dimension(
            correlated,  # whose estimated trace depends on the random vectors
            values,
            TruncatedNormal(bins, 2.0) if bins else None,
            draws=2 if bins else 1,
            trace=Hutchinson(),
            solver=SOLVER,
            first=first,
            batch_size=size,
        )

    values = torch.cat((VALUES, -VALUES))[:5]
    whole = measure(values, 3)
    joined = join_likelihoods([measure(values[:3], 3), measure(values[3:], 3, 3)])
    assert torch.equal(joined.bits, whole.bits)
    assert joined.evaluations == pytest.approx(whole.evaluations)
    assert not torch.equal(measure(values[3:], 3).bits, whole.bits[3:])
