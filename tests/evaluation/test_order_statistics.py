"""The interval of a median, beside tables and the binomial distribution of scipy."""

import pytest
from scipy import stats

from diffcore.evaluation.flow.order_statistics import coverage, median_interval, median_rank


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
