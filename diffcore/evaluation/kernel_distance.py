"""The kernel distance (KID): the squared maximum mean discrepancy under a cubic kernel."""

import torch
from torch import Tensor

from diffcore.core.random import permutation

__all__ = ["kernel_distance"]

BLOCK = 1 << 24
"""Largest number of kernel values that are in memory at once."""


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 0, subset_size: int = 1000, seed: int = 0
) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under k(x, y) = (x·y/d + 1)³.

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   x ≠ x', y ≠ y'

    Lower is better. Its expectation does not depend on the number of samples, and it is 0 for equal
    distributions, so that an estimate can be slightly negative. Computed in float64, in blocks:
    memory grows linearly with the number of samples. Bińkowski, Sutherland, Arbel & Gretton 2018,
    arXiv:1801.01401.

    Args:
        a: (N, *shape) samples, flattened to d features.
        b: (M, *shape) samples, flattened to d features.
        subsets: number of random subsets whose estimates are averaged, as in published values; 0:
            one estimate from all samples, which has a smaller variance.
        subset_size: number of samples of each set in a subset.
        seed: seed of the subsets.

    Returns:
        The distance, without unit: features are compared with 1.

    Raises:
        ValueError: a set has fewer than two samples, the samples of the sets differ in size, or a
            subset has more samples than a set.
    """
    x, y = (value.flatten(1).double() for value in (a, b))
    smallest = min(len(x), len(y))
    if smallest < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"sets are {tuple(a.shape)} and {tuple(b.shape)}, expected two samples or more, of "
            "equal size"
        )
    if not subsets:
        return _unbiased(x, y)
    if subsets < 0 or not 2 <= subset_size <= smallest:
        raise ValueError(
            f"subsets is {subsets} and subset_size {subset_size}, expected at least 1 subset of 2 "
            f"to {smallest} samples, or subsets 0 for all samples"
        )
    estimates = [
        _unbiased(
            x[permutation(seed, 2 * number, len(x))[:subset_size]],
            y[permutation(seed, 2 * number + 1, len(y))[:subset_size]],
        )
        for number in range(subsets)
    ]
    return sum(estimates) / subsets


def _unbiased(x: Tensor, y: Tensor) -> float:
    n, m = len(x), len(y)
    within = (_kernel_sum(x, x) - _self_sum(x)) / (n * (n - 1))
    within += (_kernel_sum(y, y) - _self_sum(y)) / (m * (m - 1))
    return float(within - 2 * _kernel_sum(x, y) / (n * m))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of k over all pairs."""
    parts = x.split(max(1, BLOCK // len(y)))
    return torch.stack([_cube(part @ y.T, x.shape[1]).sum() for part in parts]).sum()


def _self_sum(x: Tensor) -> Tensor:
    return _cube(x.square().sum(1), x.shape[1]).sum()


def _cube(product: Tensor, size: int) -> Tensor:
    return (product / size + 1) ** 3
