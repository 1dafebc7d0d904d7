"""Metrics by nearest neighbours: precision, recall, density, coverage, and the nearest real sample.

All distances are Euclidean, computed in float64 and in blocks, so that memory grows linearly with
the number of samples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NeighbourScores", "nearest_neighbours", "neighbour_scores"]

BLOCK = 1 << 24
"""Largest number of distances that are in memory at once."""


class NeighbourScores(NamedTuple):
    """How far samples and reference lie in each other's neighbourhoods. Higher is better.

    Args:
        precision: share of samples within the ball of a reference sample: quality.
        recall: share of reference samples within the ball of a sample: variety.
        density: mean number of reference balls around a sample, divided by k; 1 for equal
            distributions, and it may exceed 1.
        coverage: share of reference samples whose ball holds a sample: variety.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_scores(
    samples: Tensor, reference: Tensor, manifold_k: int = 3, density_k: int = 5
) -> NeighbourScores:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2), density
    and coverage (Naeem et al. 2020, arXiv:2002.09797, equations 4 and 5).

    The closed ball of a point reaches to its k-th nearest neighbour in its own set, itself
    excluded. Precision, recall and coverage depend on both numbers of samples; compare values at
    equal numbers only.

    Args:
        samples: (N, *shape) samples, flattened to features.
        reference: (M, *shape) real samples, flattened to features.
        manifold_k: k of precision and recall.
        density_k: k of density and coverage.

    Returns:
        The four scores.

    Raises:
        ValueError: a set has no more samples than k, or the samples of the sets differ in size.
    """
    x, y = _same_size(samples, reference)
    most = max(manifold_k, density_k)
    if min(manifold_k, density_k) < 1 or min(len(x), len(y)) <= most:
        raise ValueError(
            f"sets have {len(x)} and {len(y)} samples and k is {manifold_k} and {density_k}, "
            "expected k of at least 1 and more samples than k"
        )
    real_radii = _own_distances(y, most)
    own, real = real_radii[:, manifold_k - 1], real_radii[:, density_k - 1]
    fake = _own_distances(x, manifold_k)[:, -1]
    precise, dense = 0, 0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool) for _ in range(2))
    for rows, distances in _blocks(x, y):
        within = distances <= real
        precise += int((distances <= own).any(1).sum())
        dense += int(within.sum())
        covered |= within.any(0)
        recalled |= (distances <= fake[rows, None]).any(0)
    return NeighbourScores(
        precise / len(x),
        float(recalled.double().mean()),
        dense / (density_k * len(x)),
        float(covered.double().mean()),
    )


def nearest_neighbours(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest reference sample of each sample.

    A distance far below those of held-out data to the same reference is a sign of memorisation.

    Args:
        samples: (N, *shape) samples, flattened to features.
        reference: (M, *shape) real samples, such as the training data.

    Returns:
        Distances (N,) in float64, and indices (N,) into `reference`.

    Raises:
        ValueError: the samples of the sets differ in size, or a set is empty.
    """
    x, y = _same_size(samples, reference)
    index = torch.cat([distances.argmin(1) for _, distances in _blocks(x, y)])
    # The blocks lose digits at distances far below the norms: copies must have the distance 0.
    return (x - y[index]).norm(dim=1), index


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as features (N, d) in float64, centred at the mean of the second."""
    x, y = (value.flatten(1).double() for value in (a, b))
    if not len(x) or not len(y) or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"sets are {tuple(a.shape)} and {tuple(b.shape)}, expected samples of equal size"
        )
    centre = y.mean(0)
    return x - centre, y - centre


def _own_distances(x: Tensor, count: int) -> Tensor:
    """(N, count) distances to the nearest other points of the same set, in ascending order."""
    found = []
    for rows, distances in _blocks(x, x):
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        found.append(distances.topk(count, 1, largest=False).values)
    return torch.cat(found)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and their distances (rows, M) to all of y."""
    size = max(1, BLOCK // len(y))
    squares = y.square().sum(1)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        squared = part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T
        yield slice(start, start + len(part)), squared.clamp(min=0).sqrt()
