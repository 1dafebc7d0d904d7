"""The interval of a median whatever the distribution, by order statistics.

[r_(k), r_(n+1-k)] of the sorted values, with the largest k such that it covers the median with
probability 1 - 2 P(Bin(n, ½) < k) ≥ 95 %
"""

import math
from collections.abc import Sequence

__all__ = ["coverage", "median_interval", "median_rank"]

CONFIDENCE = 0.95


def median_rank(count: int, confidence: float = CONFIDENCE) -> int:
    """The largest k such that the k-th smallest and k-th largest values enclose the median.

    Args:
        count: number of values.
        confidence: probability with which they do so.

    Returns:
        The rank k, counted from 1.

    Raises:
        ValueError: not even the extremes do so (fewer than 6 values at 95 %).
    """
    outside, rank = 0.0, 0
    while 2 * (outside + math.comb(count, rank) / 2**count) <= 1 - confidence:
        outside += math.comb(count, rank) / 2**count
        rank += 1
    if not rank:
        raise ValueError(
            f"{count} values have no interval of the median at {confidence:.0%}: measure more"
        )
    return rank


def coverage(count: int) -> float:
    """The probability (a number) that the interval of `count` values covers the median."""
    return 1 - 2 * sum(math.comb(count, j) for j in range(median_rank(count))) / 2**count


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that enclose the median of the values' distribution.

    Args:
        values: independent draws, at least 6.

    Returns:
        Lower and upper end.
    """
    rank, ordered = median_rank(len(values)), sorted(values)
    return ordered[rank - 1], ordered[-rank]
