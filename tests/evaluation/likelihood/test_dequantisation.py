"""Dequantisation: the noise in the bins, its density and its entropy, and the values of data."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import integrate, stats

from diffcore.core.process import Process
from diffcore.evaluation.likelihood.dequantisation import (
    TruncatedNormal,
    Uniform,
    bin_width,
    check_values,
    detect_bins,
)
from diffcore.schedules import Discrete, Flow
from diffcore.training.data import Digits

PROCESS = Process(Flow(), shape=(1, 8, 8))
RULES = [Uniform(17), TruncatedNormal(17), TruncatedNormal(17, 0.5), TruncatedNormal(256, 5.0)]


def draws(rule, count=200):
    """Noise of one element in units of the bin, and its ln q."""
    process = replace(PROCESS, shape=(1,))
    y, log_q = rule.draw(process, torch.zeros(count, 1), 0, torch.arange(count))
    return y[:, 0] / bin_width(process, rule.bins), log_q


def density(rule, noise):
    """q at y - x_0 in the space of the data, by scipy."""
    width = bin_width(PROCESS, rule.bins)
    if isinstance(rule, Uniform):
        return stats.uniform.pdf(noise, -width / 2, width)
    tau = rule.effective_tau(PROCESS)
    return stats.truncnorm.pdf(noise, -tau, tau, scale=rule.level(PROCESS).ratio)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_density_of_the_noise_integrates_to_1_over_the_bin_and_has_its_entropy(rule):
    half = bin_width(PROCESS, rule.bins) / 2
    total, _ = integrate.quad(lambda e: density(rule, e), -half, half)
    entropy, _ = integrate.quad(
        lambda e: -density(rule, e) * math.log(density(rule, e)), -half, half, epsabs=1e-12
    )
    assert total == pytest.approx(1, abs=1e-9)
    assert rule.entropy(PROCESS) == pytest.approx(entropy, abs=1e-8)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_draws_fill_the_bin_and_come_with_their_density(rule):
    noise, log_q = draws(rule)
    width = bin_width(PROCESS, rule.bins)
    expected = [math.log(density(rule, float(e) * width)) for e in noise]
    assert noise.abs().max() <= 0.5
    assert torch.allclose(log_q, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert float(-log_q.mean()) == pytest.approx(rule.entropy(PROCESS), abs=0.2)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_draws_have_the_distribution_of_the_noise(rule):
    noise, _ = draws(rule, 1000)
    width = bin_width(PROCESS, rule.bins)
    if isinstance(rule, Uniform):
        cdf = stats.uniform(-0.5, 1).cdf
    else:
        tau = rule.effective_tau(PROCESS)
        cdf = stats.truncnorm(-tau, tau, scale=rule.level(PROCESS).ratio / width).cdf
    assert stats.kstest(noise.numpy(), cdf).pvalue > 1e-3


def test_a_draw_depends_on_the_seed_the_position_and_the_number_of_the_draw():
    rule, x0 = Uniform(17), torch.zeros(2, 1, 8, 8)
    first = rule.draw(PROCESS, x0, 0, torch.arange(2)).y
    assert not torch.equal(first[0], first[1])
    assert torch.equal(rule.draw(PROCESS, x0[:1], 0, torch.tensor([1])).y[0], first[1])
    assert not torch.equal(rule.draw(PROCESS, x0, 1, torch.arange(2)).y, first)
    assert not torch.equal(rule.draw(PROCESS, x0, 0, torch.arange(2), draw=1).y, first)


def test_the_truncated_normal_is_at_the_level_whose_noise_fills_the_bin():
    rule = TruncatedNormal(256)
    assert rule.level(PROCESS).ratio * 3 == pytest.approx(1 / 255)
    # i-DODE: τ = 3.02 at γ = -λ = -13.3 with bins of width 2/256
    assert TruncatedNormal(257, 3.0189).level(PROCESS).logsnr == pytest.approx(13.3, abs=1e-3)


def test_tau_is_smaller_where_the_cleanest_level_of_training_does_not_fit_the_bin():
    process = replace(PROCESS, schedule=Discrete())
    rule = TruncatedNormal(256)
    assert rule.level(process).logsnr == process.schedule.cleanest.logsnr
    assert rule.effective_tau(process) == pytest.approx(0.392, abs=1e-3)
    assert rule.entropy(process) < math.log(bin_width(process, 256))


def test_the_number_of_values_of_the_digits_is_17():
    x0 = Digits().x0
    assert detect_bins(PROCESS, x0) == 17
    check_values(PROCESS, x0, 17)
    with pytest.raises(ValueError, match=r"other values than the 256 .* use bins = 17"):
        check_values(PROCESS, x0, 256)


@pytest.mark.parametrize(
    "values, bins",
    [
        (torch.arange(256), 256),
        (torch.tensor([0, 255]), 256),  # also 2, but 8 bits are the rule
        (torch.arange(0, 256, 17), 256),
        (torch.tensor([0, 3, 5, 9, 16]) * 255 / 16, 17),
        (torch.tensor([7, 9, 12, 64]) * 255 / 64, 65),  # the smallest distance is two bins
        (torch.arange(0, 65536, 11) * 255 / 65535, 65536),
        (torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 255, None),
    ],
)
def test_the_number_of_values_is_detected(values, bins):
    assert detect_bins(PROCESS, (values / 127.5 - 1).float()) == bins


def test_data_without_a_finite_range_have_no_number_of_values():
    process = replace(PROCESS, low=-math.inf, high=math.inf)
    assert detect_bins(process, torch.zeros(3)) is None
    with pytest.raises(ValueError, match=r"set process\.low and process\.high"):
        Uniform(17).entropy(process)


def test_values_beyond_the_range_are_refused():
    with pytest.raises(ValueError, match="not quantised"):
        check_values(PROCESS, torch.tensor([-1.0, 1.125]), 17)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Uniform(1), "bins is 1"),
        (lambda: TruncatedNormal(17, 0.0), "tau is 0.0"),
        (lambda: TruncatedNormal(0), "bins is 0"),
    ],
)
def test_noise_that_is_out_of_range_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
