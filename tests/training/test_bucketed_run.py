"""Runs on images in buckets: a run that is interrupted continues bit for bit."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from diffcore.core.conditions import ConditionRecord
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.training.data import ImageFolder, LowResolution
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.reports.validation import Validation
from tests.helpers.mixed_images import write_mixed_images
from tests.helpers.training_runs import (
    assert_equal_checkpoints,
    crash_after,
    make_trainer,
    read_checkpoint,
    read_reports,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Convolution(nn.Module):
    """A network for images of any size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, time=None):
        return self.layer(x)


def trainer(folder, images, **options):
    defaults = {
        "network": Convolution,
        "process": Process(shape=(3, 16, 16)),
        "objective": Objective(reference_size=12),
        "data": ImageFolder(str(images), 16, buckets=Buckets((16,), 4), crop="random", flip=True),
        "batch_size": 4,
        "save_every": 3,
        "steps": 8,
    }
    return make_trainer(folder, **(defaults | options))


def test_a_run_in_buckets_continues_bit_for_bit_after_a_crash(tmp_path):
    write_mixed_images(tmp_path / "images", 24)
    trainer(tmp_path / "straight", tmp_path / "images").train()
    crash_after(trainer(tmp_path / "crashed", tmp_path / "images"), 3)
    trainer(tmp_path / "crashed", tmp_path / "images", resume=True, accumulation=1).train()
    straight, resumed = (read_checkpoint(tmp_path / name, 8) for name in ("straight", "crashed"))
    assert_equal_checkpoints(resumed, straight)
    losses = [
        [line["loss"] for line in read_reports(tmp_path / name) if "loss" in line]
        for name in ("straight", "crashed")
    ]
    assert losses[0][-5:] == losses[1][-5:]


class SuperResolution(Convolution):
    """A network whose condition has half of the height and of the width of x."""

    def forward(self, x, time, low):
        return super().forward(x) + interpolate(low, scale_factor=2)


def test_conditions_of_the_size_of_the_images_are_trained_and_validated_in_buckets(tmp_path):
    write_mixed_images(tmp_path / "images", 24)
    images = ImageFolder(str(tmp_path / "images"), 16, buckets=Buckets((16,), 4), crop="random")
    data = LowResolution(images, 2)
    process = Process(shape=(3, 16, 16), conditions={"low": ConditionRecord((3, 8, 8), -1, 1, 0.5)})
    options = {"network": SuperResolution, "process": process, "data": data}
    options |= {"validation": Validation(data, every=8)}
    straight = trainer(tmp_path / "straight", tmp_path / "images", **options).train()
    crash_after(trainer(tmp_path / "crashed", tmp_path / "images", **options), 3)
    resumed = trainer(tmp_path / "crashed", tmp_path / "images", resume=True, **options).train()
    for one, other in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert straight.held_out_losses == resumed.held_out_losses
    assert len(images.groups.shapes) > 1


def test_reports_state_the_levels_that_were_trained(tmp_path):
    """16 pixels in place of 12: the levels of all intervals are at 2 ln(12/16) lower."""
    write_mixed_images(tmp_path / "images", 8)
    bounds = []
    for size in (0, 12):
        folder = tmp_path / str(size)
        objective = Objective(reference_size=size)
        trainer(folder, tmp_path / "images", objective=objective, steps=1, log_every=1).train()
        bounds.append(torch.tensor(read_reports(folder)[0]["logsnr"][1:-1]))
    shift = torch.full_like(bounds[0], 2 * math.log(12 / 16))
    torch.testing.assert_close(bounds[1] - bounds[0], shift)
