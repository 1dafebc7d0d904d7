import math

import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from diffcore.core.gaussian import (
    discretised_log_likelihood,
    gaussian_divergence,
    gaussian_log_density,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_the_divergence_is_that_of_torch_distributions():
    m, log_v, n, log_w = numbers(4, 200)
    expected = kl_divergence(Normal(m, (log_v / 2).exp()), Normal(n, (log_w / 2).exp()))
    assert torch.allclose(gaussian_divergence(m, log_v, n, log_w), expected, rtol=1e-12)


def test_the_divergence_of_nearly_equal_gaussians_does_not_cancel():
    zero, gap = torch.zeros(1), torch.tensor([1e-3])
    assert gaussian_divergence(zero, gap, zero, zero) == pytest.approx(2.50083e-7, rel=2e-2)


def test_the_log_density_is_that_of_torch_distributions():
    x, m, log_v = numbers(3, 200)
    expected = Normal(m, (log_v / 2).exp()).log_prob(x)
    assert torch.allclose(gaussian_log_density(x, m, log_v), expected, rtol=1e-12)


@pytest.mark.parametrize("log_variance", [-8.0, -3.0, 2.0])
def test_the_probability_of_a_bin_is_a_difference_of_normal_distribution_functions(log_variance):
    x = torch.linspace(-1, 1, 17, dtype=torch.float64)
    mean, half, std = x.flip(0) / 3, 1 / 16, math.exp(log_variance / 2)
    upper, lower = x + half, x - half
    upper[-1], lower[0] = math.inf, -math.inf
    expected = norm.cdf(upper, mean, std) - norm.cdf(lower, mean, std)
    found = discretised_log_likelihood(x, mean, torch.tensor(log_variance).double(), values=17)
    assert torch.allclose(found.exp(), torch.from_numpy(expected), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("log_variance", [-30.0, -6.0, 0.0, 14.0])
def test_the_probabilities_of_all_values_sum_to_1(log_variance):
    values = torch.linspace(0, 5, 256)
    x, mean = values[:, None], torch.tensor([-3.0, 0.1, 2.49, 5.0])
    log = discretised_log_likelihood(x, mean, torch.tensor(log_variance), 0.0, 5.0)
    assert torch.allclose(log.exp().sum(0), torch.ones(4), atol=2e-4)


def test_the_logarithm_and_its_gradient_are_finite_far_from_the_data():
    x = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    for shift in (-20.0, 0.0, 20.0):
        for log_variance in (-30.0, -12.0, 0.0, 12.0):
            mean = (x + shift).requires_grad_()
            log = torch.full((4,), log_variance, requires_grad=True)
            discretised_log_likelihood(x, mean, log).sum().backward()
            assert mean.grad.isfinite().all()
            assert log.grad.isfinite().all()


@pytest.mark.parametrize("width", [0.9e-3, 1.1e-3])
def test_bins_on_both_sides_of_the_narrow_threshold_have_their_probability(width):
    std, half = (2 / 255) / width, 1 / 255
    upper, lower = norm.cdf((1.4 + half) / std), norm.cdf((1.4 - half) / std)
    x, log_variance = torch.tensor([0.3]), torch.tensor(2 * math.log(std))
    found = discretised_log_likelihood(x, x - 1.4, log_variance)
    assert found.item() == pytest.approx(math.log(upper - lower), abs=1e-3)


@pytest.mark.parametrize("options", [{"values": 1}, {"low": 1.0, "high": 1.0}])
def test_data_without_two_values_are_refused(options):
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match="at least 2 values and low < high"):
        discretised_log_likelihood(zero, zero, zero, **options)
