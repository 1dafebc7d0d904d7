"""The statistics of comparisons on constructed numbers, and the order of both sides."""

from itertools import count

from benchmarks.comparison import Comparison, time_pairs


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    """The ratio of the medians is 2 here."""
    found = Comparison("", 1.03, ours=(1.0, 2.0, 9.0), other=(1.0, 4.0, 1.0))
    assert found.ratios == [1, 0.5, 9]
    assert found.ratio == 1


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
