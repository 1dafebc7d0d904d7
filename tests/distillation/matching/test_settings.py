"""Objectives of students as settings: parsed, written as plain data, and read back."""

from pathlib import Path

import pytest
from torch import Tensor

from diffcore.distillation import (
    DistributionMatching,
    FeatureDiscriminator,
    NetworkDiscriminator,
    RewardTuning,
    SelfCooperative,
)
from diffcore.io.specs import from_spec, to_spec
from diffcore.io.trust import trust
from diffcore.objectives.objective import Objective
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.training_runs import train

FEATURES = {
    "class_path": "FeatureDiscriminator",
    "init_args": {
        "blocks": ["layers.1"],
        "r1": 1.0,
        "training": {"updates": 2, "betas": [0.0, 0.99], "lr": {"peak": 1e-3}},
    },
}
CONVOLUTION = {
    "class_path": "torch.nn.Conv2d",
    "init_args": {"in_channels": 1, "out_channels": 1, "kernel_size": 1},
}


def mean(x0: Tensor) -> Tensor:
    """The brightness of images."""
    return x0.flatten(1).mean(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The spec of a teacher that is a run."""
    folder = tmp_path_factory.mktemp("teacher")
    path = "tests.helpers.training_runs.LabelRecorder"
    config = f"network:\n  class_path: {path}\n"
    train(folder, steps=1, config=config)
    return {"class_path": "RunTeacher", "init_args": {"folder": str(folder)}}


def build(name, **arguments):
    return from_spec(Objective, {"class_path": name, "init_args": arguments})


def test_every_part_is_set_by_its_name_and_read_back(teacher):
    objective = build(
        "DistributionMatching",
        teacher=teacher,
        student={"steps": 4},
        divergence={"name": "jeffreys"},
        discriminator=FEATURES,
        adversarial=0.1,
        guidance_range=[1, 4],
    )
    assert isinstance(objective, DistributionMatching)
    assert objective.student.steps == 4
    assert objective.guidance_range == (1, 4)
    assert isinstance(objective.discriminator, FeatureDiscriminator)
    assert objective.discriminator.blocks == ("layers.1",)
    assert objective.discriminator.training.lr == LearningRate(1e-3)
    assert from_spec(Objective, to_spec(objective)) == objective


def test_a_discriminator_and_a_reward_are_named_by_their_path(teacher):
    network = {"class_path": "NetworkDiscriminator", "init_args": {"network": CONVOLUTION}}
    objective = build("SelfCooperative", discriminator=network, teacher=teacher)
    assert isinstance(objective, SelfCooperative)
    assert isinstance(objective.discriminator, NetworkDiscriminator)
    with trust(__name__):
        tuned = build("RewardTuning", reference=teacher, reward=f"{__name__}.mean")
    assert isinstance(tuned, RewardTuning)
    assert tuned.reward is mean


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DistributionMatching", {}, "teacher"),
        ("SelfCooperative", {}, "discriminator"),
        ("DistributionMatching", {"student": {"steps": 0}}, "student.steps is 0, expected 1 to 64"),
        ("DistributionMatching", {"divergense": 1}, "divergense"),
    ],
)
def test_settings_that_do_not_fit_are_refused(teacher, name, arguments, message):
    given = {"teacher": teacher} if arguments else {}
    with pytest.raises(ValueError, match=message):
        build(name, **given, **arguments)


def test_a_reward_that_is_no_function_is_named(teacher):
    with trust(__name__), pytest.raises(ValueError, match=r"CONVOLUTION is of type dict, expected"):
        build("RewardTuning", reference=teacher, reward=f"{__name__}.CONVOLUTION")


def test_a_missing_teacher_is_named():
    missing = {"class_path": "RunTeacher", "init_args": {"folder": str(Path("missing"))}}
    with pytest.raises(ValueError, match=r"teacher\.folder is missing, which does not exist"):
        build("DistributionMatching", teacher=missing)
