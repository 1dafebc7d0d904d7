"""The table of the README: each row's program shows what the row states."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/beside_diffusers.py"


@pytest.fixture(scope="module")
def checks():
    return runpy.run_path(str(EXAMPLE))["CHECKS"]


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("last-step", lambda theirs, ours: theirs > 10 and 0.45 < ours < 0.5),
        ("zero-terminal-snr", lambda theirs, ours: theirs == 1 and "use v_prediction" in ours),
        ("min-snr", lambda theirs, ours: theirs != theirs and ours == 1),
        ("laplace", lambda theirs, ours: theirs > 0.8 and abs(ours) < 1e-9),
        ("batch-size", lambda theirs, ours: not theirs and ours),
        ("half-precision-average", lambda theirs, ours: theirs == 1 and abs(ours - 1.3935) < 1e-3),
    ],
)
def test_a_row_holds(checks, name, holds):
    assert holds(*checks[name]()), name


def test_every_check_is_a_row_of_the_readme(checks):
    rows = re.findall(r"beside_diffusers\.py ([\w-]+)`", (ROOT / "README.md").read_text("utf-8"))
    assert rows == list(checks)


def test_the_tests_that_the_readme_names_exist():
    nodes = re.findall(
        r"pytest (tests/[\w/]+\.py)(?: -k (\w+))?`", (ROOT / "README.md").read_text()
    )
    assert nodes
    for path, name in nodes:
        text = (ROOT / path).read_text("utf-8")
        assert name in text, (path, name)
