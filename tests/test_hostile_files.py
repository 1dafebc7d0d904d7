"""A hostile file neither executes, nor reads outside of its folder, nor takes unbounded memory.

One process opens all of them, because an audit hook cannot be removed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hostile_files import HOSTILE
from tests.helpers.hostile_process import CASES

ROOT = Path(__file__).parents[1]
MAXIMUM_KIBIBYTES = 1 << 20
"""Memory that all hostile files together may add to the process: 1 GiB."""


def walk(trained: Path, workplace: Path) -> list[dict]:
    """What happened in each case, for each of its readers."""
    (workplace / "json.py").write_text(f"import {HOSTILE}\n")  # of the current folder
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "tests.helpers.hostile_process", str(trained)],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def check(report: dict) -> None:
    assert report["events"] == [], report
    assert report["attacked"] == [], report
    assert report["traceback"] == "", report
    assert report["status"] in (0, 1, 2), report
    assert len(report["lines"]) == bool(report["status"]), report
    assert all(len(line) < 700 for line in report["lines"]), report


@pytest.mark.slow
def test_hostile_files_are_refused_in_one_line_do_nothing_and_take_little_memory(trained, tmp_path):
    reports = walk(trained, tmp_path)
    for report in reports:
        check(report)
    refused = {report["case"] for report in reports if report["status"]}
    assert refused == set(CASES)
    assert len(CASES) == len(refused) >= 100
    grown = {report["case"]: report["grown"] for report in reports}
    assert sum(report["grown"] for report in reports) < MAXIMUM_KIBIBYTES, max(
        grown, key=grown.__getitem__
    )
