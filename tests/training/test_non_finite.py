"""Steps that are not finite: reported with their sample, skipped, and stopped after `patience`."""

import json
import math

import pytest
import torch

from diffcore.training.construction import build_state
from tests.helpers.training_runs import (
    GREY,
    HUGE,
    PROCESS,
    UNBOUNDED,
    LabelRecorder,
    ListDataset,
    make_trainer,
    read_reports,
    refused_run,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OVERFLOWING = {"data": ListDataset((HUGE, 0)), "process": UNBOUNDED, "batch_size": 2}
"""Options of a run of which no step is finite."""


def test_a_sample_that_overflows_stops_the_run_and_names_level_and_sample(tmp_path, capsys):
    data = ListDataset(*[(GREY, 0)] * 3, (HUGE, 1))
    trainer = make_trainer(
        tmp_path, data=data, process=UNBOUNDED, batch_size=4, steps=50, patience=5
    )
    expected = r"5 steps in a row were not finite \(patience is 5\): step \d, sample 3 .* at λ = "
    state, _ = refused_run(trainer, expected)
    assert state.step == 5
    assert all(value.isfinite().all() for value in state.network.state_dict().values())
    assert all(value.isfinite().all() for value in state.average.shadow.values())
    assert [report["skipped"] for report in read_reports(tmp_path)] == [1] * 5
    assert capsys.readouterr().err.count("sample 3") >= 4


def test_the_reported_level_is_that_at_which_the_sample_was_trained(tmp_path):
    times = []

    class TimeRecorder(LabelRecorder):
        def forward(self, x, time, class_labels=None):
            times.extend(time[x.flatten(1).abs().amax(1) > 1e30].tolist())
            return super().forward(x, time, class_labels)

    data = ListDataset((GREY, 0), (HUGE, 1))
    trainer = make_trainer(
        tmp_path, network=TimeRecorder, data=data, process=UNBOUNDED, batch_size=2, patience=1
    )
    _, text = refused_run(trainer, "not finite")
    logsnr = float(text.split("λ = ")[1].split(",")[0])
    assert logsnr == pytest.approx(PROCESS.schedule.logsnr((times[0] + 1) / 1000), abs=1e-3)


def test_a_rare_overflow_is_reported_and_does_not_stop_the_run(tmp_path, capsys):
    data = ListDataset(*[(GREY, 0)] * 31, (HUGE, 1))
    state = train(tmp_path, data=data, process=UNBOUNDED, batch_size=4, steps=16, patience=2)
    reports = read_reports(tmp_path)
    assert sum(report["skipped"] for report in reports) == 2  # once an epoch
    assert all((report["loss"] is None) == bool(report["skipped"]) for report in reports)
    assert all(value.isfinite().all() for value in state.network.state_dict().values())
    assert capsys.readouterr().err.count("sample 31") == 2


def test_the_samples_of_a_step_that_was_not_finite_are_written(tmp_path):
    data = ListDataset(*[(GREY, 0)] * 31, (HUGE, 1))
    state = train(tmp_path, data=data, process=UNBOUNDED, batch_size=4, steps=16, patience=2)
    lines = [json.loads(line) for line in (tmp_path / "non-finite.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        positions = range(4 * line["step"], 4 * line["step"] + 4)
        assert line["sample"] == [state.order.index(position) for position in positions]
        losses = dict(zip(line["sample"], line["loss"], strict=True))
        assert [sample for sample, loss in losses.items() if loss is None] == [31]
        key = state.sample_key(line["step"], torch.arange(4))
        times = state.settings.objective.times(key)
        expected = PROCESS.schedule.logsnr(PROCESS.schedule.training_times(times))
        assert line["logsnr"] == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("element", [math.nan, math.inf])
def test_one_element_that_is_not_finite_drops_the_whole_gradient(tmp_path, element):
    class BrokenGradient(LabelRecorder):
        def forward(self, x, time, class_labels=None):
            out = super().forward(x, time, class_labels)
            if out.requires_grad:
                out.register_hook(
                    lambda gradient: gradient.index_fill(0, torch.tensor([0]), element)
                )
            return out

    trainer = make_trainer(tmp_path, network=BrokenGradient, patience=2, optimizer=torch.optim.SGD)
    state, _ = refused_run(trainer, "2 steps in a row were not finite")
    initial = build_state(make_trainer(tmp_path / "other")).network
    trained = dict(state.network.named_parameters())
    for name, value in initial.named_parameters():
        assert torch.equal(trained[name], value), name


def test_patience_counts_across_reports(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **OVERFLOWING,
        steps=50,
        patience=5,
        log_every=3,
    )
    state, _ = refused_run(trainer, "in a row were not finite")
    assert state.step == 5
    assert [report["step"] for report in read_reports(tmp_path)] == [3]


@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 4), (2, 5), (5, 8)])
def test_a_run_stops_after_patience_steps_however_seldom_it_reports(tmp_path, first, last):
    class LateNaN(LabelRecorder):
        def forward(self, x, time, class_labels=None):
            bad = self.training and self.training_calls >= first
            return super().forward(x, time, class_labels) * (math.nan if bad else 1.0)

    trainer = make_trainer(tmp_path, network=LateNaN, steps=50, patience=3, log_every=1000)
    state, _ = refused_run(trainer, r"3 steps in a row were not finite \(patience is 3\)")
    assert state.step == last


class NormalizedNetwork(LabelRecorder):
    """It has running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1)

    def forward(self, x, time, class_labels=None):
        return super().forward(self.norm(x), time, class_labels)


def test_a_step_that_is_not_finite_leaves_the_running_statistics(tmp_path):
    data = ListDataset(*[(GREY + 0.5, 0)] * 31, (HUGE, 1))
    options = {"data": data, "process": UNBOUNDED, "batch_size": 4, "steps": 16}
    state = train(tmp_path, network=NormalizedNetwork, **options)
    assert sum(report["skipped"] for report in read_reports(tmp_path)) == 2
    assert int(state.network.norm.num_batches_tracked) == 14
    for values in (state.network.state_dict(), state.average.shadow):
        assert all(value.isfinite().all() for value in values.values())


def test_statistics_that_are_not_finite_count_as_a_step_that_is_not_finite(tmp_path):
    class Overflow(LabelRecorder):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean_square", torch.tensor(1.0))

        def forward(self, x, time, class_labels=None):
            out = super().forward(x, time, class_labels)
            if self.training:
                self.mean_square.fill_(math.inf)
            return out

    trainer = make_trainer(tmp_path, network=Overflow, patience=2)
    state, _ = refused_run(trainer, "2 steps in a row were not finite")
    assert state.network.mean_square == 1


def test_steps_after_the_last_report_are_checked_at_the_end(tmp_path):
    with pytest.raises(ValueError, match="in a row were not finite"):
        train(
            tmp_path,
            **OVERFLOWING,
            steps=4,
            patience=2,
            log_every=20,
        )
