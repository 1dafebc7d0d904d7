"""Diagonal Gaussians: their divergence, and the probability of quantised data.

They are the terms of the variational bound of a diffusion model (Ho et al. 2020, 2006.11239, eq. 5
and 13). All values are in nats and per element; the sum over the elements of a sample, divided by
their number and by ln 2, is in bits per dimension.
"""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

__all__ = ["discretised_log_likelihood", "gaussian_divergence", "gaussian_log_density"]

NARROW = 1e-3
"""Width of a bin, in standard deviations, below which its probability is density times width."""


def gaussian_divergence(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(m_1, V_1) || N(m_2, V_2)) of each element, in nats.

        (ln V_2/V_1 + V_1/V_2 + (m_1 - m_2)²/V_2 - 1) / 2

    Args:
        mean: m_1, of any shape.
        log_variance: ln V_1, which broadcasts against the mean.
        other_mean: m_2, which broadcasts against the mean.
        other_log_variance: ln V_2, which broadcasts against the mean.

    Returns:
        A tensor of the broadcast shape, at least 0 up to rounding.
    """
    gap = log_variance - other_log_variance
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return (gap.expm1() - gap + distance) / 2


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of the density of N(m, V) at each element of x.

    Args:
        x: points, of any shape.
        mean: m, which broadcasts against x.
        log_variance: ln V, which broadcasts against x.
    """
    distance = (x - mean).square() * (-log_variance).exp()
    return -(distance + log_variance + math.log(2 * math.pi)) / 2


def discretised_log_likelihood(
    x: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    low: float = -1.0,
    high: float = 1.0,
    values: int = 256,
) -> Tensor:
    """ln of the probability that N(m, V) has in the bin of each element of x.

        ln (Φ((x + w/2 - m)/√V) - Φ((x - w/2 - m)/√V)),   w = (high - low)/(values - 1)

    The bin of the lowest value begins at -inf and that of the highest ends at inf, so that the
    probabilities of all values sum to 1. The logarithm and its gradient are finite in the tails.

    Ho et al. 2020 (2006.11239, eq. 13).

    Args:
        x: data, each element one of `values` equally spaced numbers from low to high.
        mean: m, which broadcasts against x.
        log_variance: ln V, which broadcasts against x.
        low: smallest value of the data.
        high: largest value of the data.
        values: number of values that an element can have, at least 2; 256 for images of 8 bits.

    Returns:
        A tensor of the broadcast shape, at most 0.

    Raises:
        ValueError: fewer than 2 values, or low is not below high.
    """
    if values < 2 or not low < high:
        raise ValueError(
            f"the data have {values} values from {low} to {high}, expected at least 2 values and "
            "low < high"
        )
    half = (high - low) / (values - 1) / 2
    scale = (-log_variance / 2).exp()
    lower, upper = (x - half - mean) * scale, (x + half - mean) * scale
    inside = _log_interval(lower, upper, 2 * half * scale)
    edges = torch.where(x > high - half, log_ndtr(-lower), inside)
    return torch.where(x < low + half, log_ndtr(upper), edges)


def _log_interval(lower: Tensor, upper: Tensor, width: Tensor) -> Tensor:
    """ln (Φ(upper) - Φ(lower)) for upper = lower + width."""
    # Φ(b) - Φ(a) = Φ(-a) - Φ(-b): below 0 the two are small and their difference does not cancel.
    is_above = lower + upper > 0
    a, b = torch.where(is_above, -upper, lower), torch.where(is_above, -lower, upper)
    is_narrow = width < NARROW
    gap = torch.where(is_narrow, 1.0, log_ndtr(b) - log_ndtr(a))
    middle = (a + b) / 2
    density = -(middle.square() + math.log(2 * math.pi)) / 2 + width.log()
    return torch.where(is_narrow, density, log_ndtr(b) + (-(-gap).expm1()).log())
