"""The energy distance between two sets of samples, by random projections."""

import math

import torch
from torch import Tensor

from diffcore.core.random import Stream, normal

__all__ = ["energy_distance"]

BLOCK = 1 << 24
"""Largest number of projected values that are in memory at once."""


def energy_distance(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """An unbiased estimate of the energy distance, from sliced distances.

        2 E|x - y| - E|x - x'| - E|y - y'|,   |z| = E_u |u·z| √π Γ((d+1)/2) / Γ(d/2)

    The norm of z is the mean of its projections on random unit vectors u, up to a constant, and a
    mean distance in one dimension follows from sorted values without forming pairs. Lower is
    better; 0 exactly for equal distributions, so that an estimate can be slightly negative.
    Székely & Rizzo 2013.

    Args:
        a: (N, *shape) samples, flattened to d features.
        b: (M, *shape) samples, flattened to d features.
        directions: number of unit vectors u; one is exact for d = 1.
        seed: seed of the directions.

    Returns:
        The distance, in units of the features.

    Raises:
        ValueError: a set has fewer than two samples, the samples of the sets differ in size, or
            there are no directions.
    """
    x, y = (value.flatten(1).double() for value in (a, b))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1] or directions < 1:
        raise ValueError(
            f"sets are {tuple(a.shape)} and {tuple(b.shape)} with {directions} directions, "
            "expected two samples or more, of equal size, and at least 1 direction"
        )
    d = x.shape[1]
    u = normal(seed, Stream.EVALUATION, torch.arange(directions), (d,), dtype=torch.float64)
    u = u / u.norm(dim=1, keepdim=True)
    parts = u.split(max(1, BLOCK // (len(x) + len(y))))
    total = torch.cat([_in_one_dimension(part @ x.T, part @ y.T) for part in parts]).mean()
    constant = math.sqrt(math.pi) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return float(total * constant)


def _in_one_dimension(x: Tensor, y: Tensor) -> Tensor:
    """The estimate for each row of values x (K, N) and y (K, M)."""
    n, m = x.shape[1], y.shape[1]
    own_x, own_y = _pair_sum(x), _pair_sum(y)
    across = _pair_sum(torch.cat((x, y), 1)) - own_x - own_y
    return 2 * across / (n * m) - 2 * own_x / (n * (n - 1)) - 2 * own_y / (m * (m - 1))


def _pair_sum(x: Tensor) -> Tensor:
    """Σ_{i<j} |x_i - x_j| = Σ_i (2i - n + 1) x_(i) of the sorted values of each row."""
    n = x.shape[1]
    return x.sort(1).values @ (2 * torch.arange(n, dtype=x.dtype) - n + 1)
