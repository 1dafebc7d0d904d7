"""The drill of faults: what it draws, what it compares, and that small runs survive it."""

import random
import signal

import pytest
from experiments.kill_drill import (
    KINDS,
    Comparison,
    Drill,
    Fault,
    Hit,
    compare_files,
    format_report,
    plan_faults,
    run_drill,
)

TINY = (
    "digits",
    "--network.init_args.block_out_channels=[16,32]",
    "--network.init_args.norm_num_groups=8",
    "--network.init_args.attention_head_dim=8",
    "--trackers=[]",
    "--batch-size=16",
    "--sample-every=0",
    "--steps=40",
    "--save-every=10",
    "--log-every=1",
    "--keep=100",
    "--rank-timeout=60",
)


def test_faults_are_drawn_by_the_seed_alone_in_the_order_of_their_steps():
    faults = plan_faults(20, 10, 200, 2, seed=3)
    random.seed(0)
    assert faults == plan_faults(20, 10, 200, 2, seed=3)
    assert faults != plan_faults(20, 10, 200, 2, seed=4)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert {fault.rank for fault in faults} == {0, 1}
    counts = {kind: sum(fault.kind == kind for fault in faults) for kind in KINDS}
    expected = {"step": 9, "checkpoint": 5, "average": 2, "pipeline": 2, "start": 2, "SIGTERM": 10}
    assert counts == expected


def test_files_that_differ_are_found_and_checkpoints_of_signals_left_out(tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name / "checkpoints/step-00000010").mkdir(parents=True)
        (tmp_path / name / "checkpoints/step-00000010/manifest.json").write_text("1")
        (tmp_path / name / "metrics.jsonl").write_text("1")
    killed = tmp_path / "killed"
    (killed / "checkpoints/step-00000007").mkdir()
    (killed / "checkpoints/step-00000007/manifest.json").write_text("1")
    assert compare_files(tmp_path / "straight", killed) == Comparison(2, [])
    (killed / "metrics.jsonl").write_text("2")
    (killed / ".left").write_text("")
    (killed / "checkpoints/step-00000010/manifest.json").unlink()
    expected = [".left", "checkpoints/step-00000010/manifest.json", "metrics.jsonl"]
    assert compare_files(tmp_path / "straight", killed).differing == expected


@pytest.mark.parametrize(
    ("kind", "statuses", "explained", "expected"),
    [
        ("SIGTERM", [143, 143], False, True),
        ("SIGTERM", [143, 0], False, False),
        ("SIGTERM", [-signal.SIGTERM, 143], False, False),
        ("step", [1, -9], True, True),
        ("step", [1, -9], False, False),
        ("step", [0, -9], True, False),
        ("step", [1, 0], True, False),
    ],
)
def test_a_status_or_message_that_is_not_documented_counts(kind, statuses, explained, expected):
    hit = Hit(Fault(kind, 3, 1, 0.0), 4, ["x"], statuses, 0.5, explained)
    assert hit.is_expected == expected
    row = f"| {KINDS[kind]} | 1 | {int(expected)} | 1 | 0.5 |"
    assert row in format_report([hit], Comparison(5, ["a"]))
    assert format_report([hit], Comparison(5, ["a"])).endswith("5 files compared; different: a")


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.thorough)],
)
def test_a_run_that_loses_its_ranks_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, ranks):
    kinds = ("step", "checkpoint", "SIGTERM")
    faults = [Fault(kind, 8 * index + 1, index % ranks, 0.5) for index, kind in enumerate(kinds)]
    hits, comparison = run_drill(Drill(tmp_path, TINY, ranks), faults, print)
    assert [hit for hit in hits if not hit.is_expected] == []
    assert comparison.differing == []
    assert comparison.count >= 20
