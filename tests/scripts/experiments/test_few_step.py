"""The study of few-step students: its table, and what it does not measure again."""

import json

import pytest
import torch
from experiments.students import few_step

from diffcore.distillation import DenoisingGAN, DiffusionGAN, SelfCooperative
from diffcore.io.specs import from_spec
from diffcore.objectives.objective import Objective

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


@pytest.fixture
def commands(monkeypatch):
    """The commands that the study runs, which are only recorded."""
    words = []

    def command(*given):
        words.append(given)
        return 7.0

    monkeypatch.setattr(few_step, "run_command", command)
    monkeypatch.setattr(
        few_step,
        "read_json",
        lambda path: {name: {"samples": 0.25} for name in few_step.METRICS},
    )
    return words


def rows_of(file, method, seed):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if (row["method"], row["seed"]) == (method, seed)]


def test_what_the_file_holds_is_not_measured_again(file, tmp_path, commands):
    """The teacher in 25 steps, and a student of seed 1 in one step."""
    few_step.measure(tmp_path / "t", tmp_path, file, ["MeanFlow"], [1])
    own = str(few_step.student_folder(tmp_path, "MeanFlow", 1))
    assert [words[:2] for words in commands] == [
        *[("evaluate", str(tmp_path / "t"))] * 3,
        ("distil", str(tmp_path / "t")),
        *[("evaluate", own)] * 2,
    ]
    assert [row["steps"] for row in rows_of(file, "MeanFlow", 1)] == [1, 2, 4]
    commands.clear()
    few_step.measure(tmp_path / "t", tmp_path, file, ["MeanFlow"], [1])
    assert commands == []


def test_the_seconds_of_a_training_are_those_of_an_uninterrupted_one(file, tmp_path, commands):
    few_step.student_folder(tmp_path, "Shortcut", 0).mkdir()
    few_step.measure(tmp_path / "t", tmp_path, file, ["Shortcut"], [0, 1])
    seconds = [
        {row.get("training_processor_seconds") for row in rows_of(file, "Shortcut", seed)}
        for seed in (0, 1)
    ]
    assert seconds == [{None}, {7}]


@pytest.mark.parametrize("kind", [SelfCooperative, DiffusionGAN, DenoisingGAN])
def test_an_adversarial_student_is_trained_by_its_objective(tmp_path, kind):
    words = few_step.METHODS[kind.__name__](tmp_path / "t", tmp_path)
    assert words[:2] == ["train", "digits-dmd"]
    assert f"--init={tmp_path / 't'}" in words
    spec = json.loads(next(w for w in words if w.startswith("--objective=")).partition("=")[2])
    objective = from_spec(Objective, spec)
    assert isinstance(objective, kind)
    assert objective.student.steps == 4
    discriminator = objective.discriminator
    assert (discriminator.r1, discriminator.training.lr.peak) == (0.03, 2e-3)
    network = discriminator.network()
    x, labels = torch.zeros(2, network.config.in_channels, 8, 8), torch.zeros(2).long()
    assert network(x, torch.zeros(2), labels).sample.shape == (2, 1, 8, 8)
