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


pytestmark = pytest.mark.xdist_group("hostile files")  # one walk serves all tests


@pytest.fixture(scope="module")
def reports(trained, tmp_path_factory):
    """What happened in each case, for each of its readers."""
    workplace = tmp_path_factory.mktemp("hostile")
    (workplace / "json.py").write_text(f"import {HOSTILE}\n")  # of the current folder
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "tests.helpers.hostile_process", str(trained)],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: dict = {}
    for line in ended.stdout.splitlines():
        report = json.loads(line)
        found.setdefault(report["case"], []).append(report)
    return found


def test_there_are_many_hostile_files():
    assert len(CASES) == len(set(CASES)) >= 100


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_refused_in_one_line_and_does_nothing(reports, case):
    for report in reports[case]:
        reader = report["entry"]
        assert report["events"] == [], reader
        assert report["attacked"] == [], reader
        assert report["traceback"] == "", reader
        assert report["status"] in (0, 1, 2), reader
        assert len(report["lines"]) == bool(report["status"]), reader
        assert all(len(line) < 700 for line in report["lines"]), reader
    assert any(report["status"] for report in reports[case])


def test_hostile_files_take_little_memory(reports):
    grown = {case: sum(report["grown"] for report in found) for case, found in reports.items()}
    assert sum(grown.values()) < MAXIMUM_KIBIBYTES, max(grown, key=grown.__getitem__)
