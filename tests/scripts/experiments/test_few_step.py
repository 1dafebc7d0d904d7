"""The study of few-step students: its table, and what it does not measure again."""

import json

import pytest
from experiments.students import few_step

ROWS = [
    {"method": "teacher", "seed": 0, "steps": 25, "frechet_distance": 0.5, "label_accuracy": 1.0},
    {"method": "MeanFlow", "seed": 0, "steps": 1, "frechet_distance": 1.0, "label_accuracy": 0.9},
    {"method": "MeanFlow", "seed": 1, "steps": 1, "frechet_distance": 2.0, "label_accuracy": 0.8},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "few-step.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_table_has_means_spreads_and_ratios_to_the_teacher(file):
    lines = few_step.table(file).splitlines()
    assert lines[2] == "| teacher | 25 | 1 | 0.500 | 1.00 | 1.000 |"
    assert lines[3] == "| MeanFlow | 1 | 2 | 1.500 (1.000 to 2.000) | 3.00 | 0.850 |"


def test_a_student_that_the_file_holds_is_not_trained_again(file, tmp_path, monkeypatch):
    commands = []

    def command(*words):
        commands.append(words[:2])
        return 7.0

    monkeypatch.setattr(few_step, "_command", command)
    monkeypatch.setattr(
        few_step,
        "read_json",
        lambda path: {name: {"samples": 0.25} for name in few_step.METRICS},
    )
    few_step.measure(tmp_path / "t", tmp_path, file, ["MeanFlow"], [1, 2])
    own = str(few_step.student_folder(tmp_path, "MeanFlow", 2))
    assert commands == [("distil", str(tmp_path / "t")), *[("evaluate", own)] * 3]
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["training_processor_seconds"] == 7
    assert (last["seed"], last["steps"]) == (2, 4)
