"""The statistics of comparisons on constructed numbers, and the order of both sides."""

from itertools import count

import pytest
from benchmarks.comparison import (
    Comparison,
    coverage,
    median_interval,
    median_rank,
    time_pairs,
)
from scipy import stats


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    """The ratio of the medians is 2 here."""
    found = Comparison("", 1.03, ours=(1.0, 2.0, 9.0), other=(1.0, 4.0, 1.0))
    assert found.ratios == [1, 0.5, 9]
    assert found.ratio == 1


@pytest.mark.parametrize("pairs, rank", [(30, 10), (40, 14), (100, 40)])
def test_the_interval_has_the_tabulated_ranks(pairs, rank):
    """Conover 1999, 3.2: the k-th smallest and largest of n, by the binomial distribution.

    P(X ≤ k) in place of P(X < k) would give a rank that is one too small.
    """
    assert median_rank(pairs) == rank
    assert coverage(pairs) == pytest.approx(
        1 - 2 * stats.binom.cdf(rank - 1, pairs, 0.5), abs=1e-12
    )
    assert coverage(pairs) >= 0.95 > 1 - 2 * stats.binom.cdf(rank, pairs, 0.5)
    shuffled = [float(i * 7 % pairs + 1) for i in range(pairs)] if pairs % 7 else []
    assert median_interval(shuffled) == (rank, pairs + 1 - rank)


def test_too_few_values_have_no_interval():
    assert median_rank(6) == 1
    with pytest.raises(ValueError, match="5 values"):
        median_rank(5)


def test_sides_alternate_in_their_order_and_the_warm_up_is_dropped():
    """If ours were always first, the state of the caches would favour one side."""
    calls: list[str] = []
    ticks = count()
    ours, other = time_pairs(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        3,
        warmup=1,
        clock=lambda: next(ticks) ** 2,
    )
    assert "".join(calls) == "ABBAABBA"
    assert ours == (13, 17, 29)  # (t+1)² - t² at ticks t = 6, 8, 14, one pair after the warm-up's
    assert other == (9, 21, 25)
