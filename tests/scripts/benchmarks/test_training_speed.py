"""Training beside bare PyTorch: both sides do the same work; no times are tested."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmarks.sides.bare_loop import BareLoop
from benchmarks.training_speed import (
    compare_draws,
    digits_state,
    measure_intervals,
    measure_loops,
    measure_overhead,
    measure_training,
    step_function,
)

from diffcore.training.reports.reporting import SCALARS


@pytest.mark.parametrize("wrong", [{"pairs": 29}, {"steps": 0}, {"samples": 0}])
def test_bad_arguments_are_refused_before_training_is_prepared(wrong):
    with pytest.raises(ValueError, match="expected at least"):
        measure_overhead(**wrong)


@pytest.mark.parametrize("wrong", ({"pairs": 29}, {"steps": 0}), ids=str)
def test_bad_arguments_of_the_training_benchmarks_are_refused(wrong):
    for measure in (measure_training, partial(measure_loops, {})):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            measure(**wrong)


@pytest.mark.parametrize("wrong", ({"pairs": 29}, {"samples": 0}), ids=str)
def test_bad_arguments_of_the_guidance_benchmark_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        measure_intervals(**wrong)


def test_an_interval_is_compared_at_its_share_of_the_evaluations(monkeypatch):
    """(0.285, 2.415] contains 6 of 22 steps, (0.5, 1] 3; a guided step costs two evaluations."""

    def call_once(ours, other, pairs):
        ours()
        other()
        return (1.0,) * pairs, (2.0,) * pairs

    monkeypatch.setattr("benchmarks.training_speed.time_pairs", call_once)
    found = measure_intervals(pairs=30, samples=1)
    assert "28 evaluations of 44" in found[0].name
    assert "25 evaluations of 44" in found[1].name
    assert [comparison.bound for comparison in found] == [round(28 / 44, 3), round(25 / 44, 3)]


def test_the_seconds_are_those_of_one_step(monkeypatch):
    calls = []

    def time_once(ours, other, pairs, clock):
        ours()
        other()
        return (8.0,) * pairs, (4.0,) * pairs

    state = SimpleNamespace(window=SimpleNamespace(restore=calls.append))
    loop = SimpleNamespace(step=lambda: calls.append("other"))
    module = "benchmarks.training_speed"
    monkeypatch.setattr(f"{module}.time_pairs", time_once)
    monkeypatch.setattr(f"{module}.digits_state", lambda folder: state)
    monkeypatch.setattr(f"{module}.step_function", lambda state: lambda: calls.append("ours"))
    (found,), absent = measure_loops({"a library": lambda: loop}, 30, 4)
    assert (found.ours, found.other, absent) == ((2.0,) * 30, (1.0,) * 30, [])
    assert found.name == "training step beside a library"
    assert calls == ["ours"] * 4 + ["other"] * 4 + [None]


def test_both_sides_do_the_same_work(tmp_path):
    """Equal weights and draws give equal losses, gradient norm, learning rate and averages.

    A bare side without the Min-SNR weight, the clipping or the average would do less work.
    """
    state = digits_state(tmp_path)
    bare = BareLoop(torch.device("cpu"))
    bare.network.load_state_dict(state.network.state_dict())
    bare.shadow = [value.clone() for value in state.network.parameters()]
    places = torch.arange(state.settings.batch_size)
    draw = state.settings.objective.draw(
        state.settings.process, state.sample_key(state.step, places)
    )
    rows = torch.tensor([state.order.index(int(place)) for place in places])
    labels = bare.labels[rows].masked_fill(draw.dropout_mask, state.settings.process.classes)
    found = bare.update(bare.x0[rows], labels, draw.level.t.flatten().float(), draw.noise)
    step_function(state)()
    norm, losses = state.window.rows[0][0], state.window.rows[0][SCALARS:]
    torch.testing.assert_close(found, (losses, norm), rtol=2e-5, atol=1e-7)
    assert bare.optimizer.param_groups[0]["lr"] == pytest.approx(
        state.optimizer.param_groups[0]["lr"], rel=1e-12
    )
    names = [name for name, _ in state.network.named_parameters()]
    shadow = [state.average.shadow[name] for name in names]
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(bare.shadow, shadow, strict=True)])
    # The first step of AdamW turns rounding errors of tiny gradients into signs.
    assert (moved < 1e-7).float().mean() > 0.99


def test_the_draws_of_a_step_are_compared_with_the_step(tmp_path):
    """Both sides are called once in each pair; their times are not tested."""
    state = digits_state(tmp_path)
    found = compare_draws(state, 1, warmup=0)
    assert (len(found.ours), len(found.other), found.bound) == (1, 1, 0.01)
    assert state.step == 1
