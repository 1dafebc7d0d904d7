"""The benchmark's statistics on made-up numbers, its order, and that both sides do the same work. Nothing is timed."""

from itertools import count

import pytest
import torch
from benchmarks.training_speed import (
    BareLoop,
    Comparison,
    coverage,
    digits_state,
    draws,
    interleaved,
    intervals,
    median_interval,
    median_rank,
    overhead,
    stepper,
)
from scipy import stats


def test_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    """Would be a bug: median(ours) / median(bare) is 2 here."""
    found = Comparison("", 1.03, ours=(1.0, 2.0, 9.0), bare=(1.0, 4.0, 1.0))
    assert found.ratios == [1, 0.5, 9]
    assert found.ratio == 1


@pytest.mark.parametrize("pairs, rank", [(30, 10), (40, 14), (100, 40)])
def test_interval_is_the_tabulated_order_statistics(pairs, rank):
    """Conover 1999, 3.2: the k-th smallest and largest of n, by the binomial distribution.

    Would be a bug: counting P(X ≤ k) instead of P(X < k) gives k one too small.
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


def test_sides_alternate_in_who_comes_first_and_the_warm_up_is_dropped():
    """Would be a bug: always ours first, so that what the first leaves in the caches counts for one side."""
    calls: list[str] = []
    ticks = count()
    ours, bare = interleaved(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        3,
        warmup=1,
        clock=lambda: next(ticks) ** 2,
    )
    assert "".join(calls) == "ABBAABBA"
    assert ours == (13, 17, 29)  # (t+1)² - t² at ticks t = 6, 8, 14, one pair after the warm-up's
    assert bare == (9, 21, 25)


@pytest.mark.parametrize("wrong", [{"pairs": 29}, {"steps": 0}, {"rows": 0}])
def test_bad_arguments_are_refused_before_anything_is_built(wrong):
    with pytest.raises(ValueError, match="expected at least"):
        overhead(**wrong)


@pytest.mark.parametrize("wrong", ({"pairs": 29}, {"rows": 0}), ids=str)
def test_bad_arguments_of_the_guidance_benchmark_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        intervals(**wrong)


def test_an_interval_is_compared_at_its_share_of_the_evaluations(monkeypatch):
    """(0.285, 2.415] holds 6 of 22 steps, (0.5, 1] 3 of 22; each guided one costs two evaluations."""

    def once(ours, bare, pairs):
        ours()
        bare()
        return (1.0,) * pairs, (2.0,) * pairs

    monkeypatch.setattr("benchmarks.training_speed.interleaved", once)
    found = intervals(pairs=30, rows=1)
    assert ["28 evaluations of 44" in found[0].name, "25 evaluations of 44" in found[1].name] == [
        True,
        True,
    ]
    assert [comparison.bound for comparison in found] == [round(28 / 44, 3), round(25 / 44, 3)]


def test_both_sides_do_the_same_work(tmp_path):
    """From equal weights and draws: equal losses, gradient norm and learning rate, and equal averages after the step.

    Would be a bug: a bare side without the Min-SNR weight, the clipping or the average is compared as if it did the same.
    """
    state = digits_state(tmp_path)
    bare = BareLoop(torch.device("cpu"))
    bare.network.load_state_dict(state.network.state_dict())
    bare.shadow = [value.clone() for value in state.network.parameters()]
    places = torch.arange(state.settings.batch_size)
    draw = state.settings.objective.draw(state.settings.process, state.sample_key(places))
    rows = torch.tensor([state.order.index(int(place)) for place in places])
    labels = bare.labels[rows].masked_fill(draw.dropped, state.settings.process.classes)
    found = bare.update(bare.x0[rows], labels, draw.level.t.flatten().float(), draw.noise)
    stepper(state)()
    norm, losses = state.window.rows[0][0], state.window.rows[0][1:]
    torch.testing.assert_close(found, (losses, norm), rtol=2e-5, atol=1e-7)
    assert bare.optimizer.param_groups[0]["lr"] == pytest.approx(
        state.optimizer.param_groups[0]["lr"], rel=1e-12
    )
    names = [name for name, _ in state.network.named_parameters()]
    shadow = [state.average.shadow[name] for name in names]
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(bare.shadow, shadow, strict=True)])
    assert (
        moved < 1e-7
    ).float().mean() > 0.99  # the first step of AdamW turns rounding of tiny gradients into signs


def test_the_draws_of_a_step_are_compared_with_the_step(tmp_path):
    """Both sides are called once a pair, on the steps of one run; nothing is asserted of their times."""
    state = digits_state(tmp_path)
    found = draws(state, 1, warmup=0)
    assert (len(found.ours), len(found.bare), found.bound) == (1, 1, 0.01)
    assert state.step == 1
