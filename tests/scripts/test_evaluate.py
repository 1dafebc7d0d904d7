"""`scripts/evaluate.py` refuses what it cannot evaluate before it samples."""

import sys

import evaluate
import pytest

from diffcore.core.process import Process


@pytest.mark.parametrize("fields", [{"shape": (1, 8, 8)}, {"shape": (3, 32, 32), "classes": 10}])
def test_a_run_that_is_not_of_digits_is_refused_at_once(tmp_path, monkeypatch, capsys, fields):
    Process(**fields).save(tmp_path / "process.json")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path)])
    monkeypatch.setattr(evaluate, "score_digits", pytest.fail)
    assert evaluate.main() == 1
    assert "the run is not one of the digits" in capsys.readouterr().err
