"""Reports: losses in the order of the global batch, non-finite steps, and metrics.jsonl."""

import json
import math

import pytest
import torch

from diffcore.io.files import WriteError
from diffcore.training.data import DataOrder
from diffcore.training.reports.metrics import Metrics
from diffcore.training.reports.window import LossWindow, NonFinite, find_non_finite
from tests.helpers.file_faults import full_disk

STEPS, BATCH = 3, 8


def table(steps=STEPS):
    """(steps, 1 + B): the norm 100·step, then the losses 10·step + index in the batch."""
    step = torch.arange(steps)[:, None]
    return torch.cat((100.0 * step, 10.0 * step + torch.arange(BATCH)), 1)


def windows(world, parts, past=None, group=1):
    """One window for each rank, filled like in training; `gather` stacks the rows of all ranks."""
    ranks = []

    def gather(_):
        return stacked

    for rank in range(world):
        window = LossWindow(parts, gather, group)
        order = DataOrder(BATCH, 0, BATCH, parts, rank, world).keep_together(group)
        window.restore(past)
        ranks.append(window)
        for row in table():
            window.add(row[1:][[index for part in order.parts for index in part]], row[0])
    stacked = torch.stack([torch.stack(window.rows) for window in ranks])
    return ranks


@pytest.mark.parametrize(
    ("world", "parts", "group"),
    [(1, 1, 1), (1, 4, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1), (1, 8, 1), (8, 1, 1), (1, 2, 4)],
)
def test_columns_are_in_the_order_of_the_global_batch_for_every_split(world, parts, group):
    for window in windows(world, parts, group=group):
        assert torch.equal(window.gathered(), table())


def test_a_window_continues_the_steps_of_a_checkpoint():
    past = table(2) + 0.5
    (window,) = windows(1, 2, past)
    assert torch.equal(window.gathered(), torch.cat((past, table())))
    window.restore(None)
    assert len(window.gathered()) == 0
    window.restore(past)
    assert torch.equal(window.gathered(), past)


@pytest.mark.parametrize("empty", [None, torch.zeros(0), torch.zeros(0, 9)])
def test_restoring_an_empty_window_changes_nothing(empty):
    (window,) = windows(1, 1, empty)
    assert torch.equal(window.gathered(), table())


def test_a_step_that_is_not_finite_is_found_with_its_sample():
    broken = table()
    broken[1, 1 + 5] = math.nan
    broken[2, 1 + 3] = math.inf
    broken[2, 1 + 6] = math.nan
    found = find_non_finite(broken[:, 0], broken[:, 1:], first=40)
    assert [(item.step, item.batch_index) for item in found] == [(41, 5), (42, 3)]
    assert math.isnan(found[0].loss)
    assert found[1].loss == math.inf
    assert find_non_finite(table()[:, 0], table()[:, 1:], 40) == []


def test_a_norm_that_is_not_finite_points_at_the_largest_loss():
    broken = table()
    broken[1, 0] = math.inf
    broken[1, 1 + 2] = 999.0
    assert find_non_finite(broken[:, 0], broken[:, 1:], 0) == [NonFinite(1, 2, 999.0)]


@pytest.fixture
def metrics(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (5, 10, 15):
        metrics.write({"step": step, "loss": 1 / step})
    return metrics


def steps(metrics):
    return [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("step", "left"),
    [(0, []), (5, [5]), (9, [5]), (10, [5, 10]), (15, [5, 10, 15]), (99, [5, 10, 15])],
)
def test_a_rewind_drops_what_was_reported_later(metrics, step, left):
    before = metrics.path.read_text()
    metrics.rewind(step)
    assert steps(metrics) == left
    assert before.startswith(metrics.path.read_text())


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "", "{}", "[]", "nonsense"])
def test_a_line_torn_by_a_crash_is_dropped(metrics, torn):
    whole = metrics.path.read_text()
    metrics.path.write_text(whole + torn)
    metrics.rewind(20)
    assert metrics.path.read_text() == whole
    metrics.write({"step": 20})
    assert steps(metrics) == [5, 10, 15, 20]


def test_a_rewind_of_no_file_makes_none(tmp_path):
    Metrics(tmp_path / "metrics.jsonl").rewind(3)
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_the_error_names_the_metrics_and_what_is_kept(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    message = r"metrics.jsonl cannot be written \(.*\): its lines and the checkpoints are kept"
    with full_disk(20), pytest.raises(WriteError, match=message):
        metrics.write({"step": 2, "loss": 0.5})
    assert metrics.reports() == [{"step": 1}]
    metrics.rewind(1)
    metrics.write({"step": 2})
    assert metrics.reports() == [{"step": 1}, {"step": 2}]


def test_a_line_that_is_nested_too_deeply_or_whose_step_is_no_number_is_no_report(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + '\n{"step": "2"}\n{"step": 1}\n[]\n')
    assert Metrics(path).reports() == [{"step": 1}]
    assert Metrics(path).rewind(1) == [1, 2]
