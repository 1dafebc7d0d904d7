"""The command of the studies: what it refuses in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiment.py"


@pytest.mark.slow
@pytest.mark.parametrize("study, known", [("claims", "oracles"), ("conditions", "moons")])
def test_an_unknown_part_of_a_study_is_refused_in_one_line(tmp_path, study, known):
    command = [sys.executable, str(SCRIPT), study, "--only", "typo"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("--only has 'typo', expected some of ")
    assert known in ended.stderr
    assert ended.stderr.count("\n") == 1
