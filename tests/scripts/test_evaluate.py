"""`scripts/evaluate.py` writes its result, and refuses what it cannot evaluate at once."""

import json
import shutil
import sys

import evaluate
import pytest

from diffcore.core.process import Process
from diffcore.io.files import hash_file


@pytest.mark.parametrize("fields", [{"shape": (1, 8, 8)}, {"shape": (3, 32, 32), "classes": 10}])
def test_a_run_that_is_not_of_digits_is_refused_at_once(tmp_path, monkeypatch, capsys, fields):
    Process(**fields).save(tmp_path / "process.json")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path)])
    monkeypatch.setattr(evaluate, "score_digits", pytest.fail)
    assert evaluate.main() == 1
    assert "the run is not one of the digits" in capsys.readouterr().err


def test_the_result_is_written_with_what_repeats_it(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "--per-label=1"])
    assert evaluate.main() == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["weights"] == hash_file(run / "ema.safetensors")
    assert (result["count"], result["seeds"], result["steps"]) == (10, "0-9", 25)
    assert result["sampler"]["class_path"] == "DDIM"
    assert 0 <= result["accuracy"] <= 1
