"""Trackers: names, settings, images, and the same run of Weights & Biases after a resume."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffcore.io.files import CorruptFileError
from diffcore.training.reports.previews import Previews
from diffcore.training.reports.tracking import Tracking
from tests.helpers.training_runs import crash_after, make_trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeRun:
    """A run of Weights & Biases: points by step; `step` is the first that is not complete."""

    def __init__(self, points):
        self.points, self.step = points, max(points, default=-1) + 1

    def log(self, values, step):
        assert step >= self.step, "wandb drops points of earlier steps with a warning"
        self.step = step
        self.points.setdefault(step, {}).update(values)

    def finish(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in of the package: runs on its server by id, and the arguments of `init`."""
    module = ModuleType("wandb")
    module.server, module.calls, module.settings = {}, [], []

    def init(**options):
        module.calls.append(options)
        return FakeRun(module.server.setdefault(options["id"], {}))

    module.init = init
    module.config = SimpleNamespace(update=lambda values, **_: module.settings.append(values))
    module.Image = np.asarray
    monkeypatch.setitem(sys.modules, "wandb", module)
    available = [LoggerType.TENSORBOARD, LoggerType.WANDB]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    return module


def test_project_and_names_are_those_of_the_settings(tmp_path, wandb):
    train(tmp_path / "digits", trackers=["wandb"], steps=1)
    named = Tracking("faces", "third try")
    train(tmp_path / "other", trackers=["wandb"], steps=1, tracking=named)
    found = [(call["project"], call["name"], call["resume"]) for call in wandb.calls]
    assert found == [("diffcore", "digits", "allow"), ("faces", "third try", "allow")]
    assert wandb.calls[0]["id"] != wandb.calls[1]["id"]
    with pytest.raises(ValueError, match=r'tracking.project is ""'):
        Tracking("")


def test_settings_are_logged(tmp_path, wandb):
    train(tmp_path / "python", trackers=["wandb", "tensorboard"], steps=1)
    train(tmp_path / "file", trackers=["wandb"], steps=1, config="network: {width: 3}\n")
    assert (wandb.settings[0]["batch_size"], wandb.settings[0]["lr"]["peak"]) == (16, 1e-3)
    assert wandb.settings[1] == {"network": {"width": 3}}
    events = EventAccumulator(str(tmp_path / "python/tensorboard")).Reload()
    (text,) = events.Tensors("settings/text_summary")
    assert b"batch_size: 16" in text.tensor_proto.string_val[0]


def test_a_resumed_run_continues_its_run_and_repeats_no_point(tmp_path, wandb):
    options = {"trackers": ["wandb", "tensorboard"], "save_every": 3}
    crash_after(make_trainer(tmp_path, **options), 3)
    crash_after(make_trainer(tmp_path, **(options | {"save_every": 5}), resume=True), 5)
    for path in (tmp_path / "checkpoints/step-00000005").iterdir():
        path.unlink()
    train(tmp_path, resume=True, **options)
    assert len(wandb.calls) == 3
    identity = json.loads((tmp_path / "wandb.json").read_text())
    assert identity == {"id": wandb.calls[0]["id"], "project": "diffcore"}
    (points,) = wandb.server.values()
    assert sorted(points) == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr", "images_per_second", "loss/level 0"} <= points[6].keys()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_another_project_or_a_new_start_is_another_run(tmp_path, wandb):
    train(tmp_path, trackers=["wandb"], steps=1)
    train(tmp_path, trackers=["wandb"], steps=2, resume=True, tracking=Tracking("second"))
    assert len(wandb.server) == 2
    (tmp_path / "wandb.json").write_text('{"id": 3}')
    with pytest.raises(CorruptFileError, match="has no id and project"):
        train(tmp_path, trackers=["wandb"], steps=3, resume=True)


def test_previews_are_sent_to_both_trackers(tmp_path, wandb):
    previews = Previews(labels=(1, 2), per_label=2)
    options = {"sample_every": 1, "sample_steps": 2, "previews": previews}
    train(tmp_path, trackers=["wandb", "tensorboard"], steps=2, **options)
    (points,) = wandb.server.values()
    images = [points[step]["samples"][0] for step in (1, 2)]
    assert all(image.ndim == 3 and image.shape[2] == 3 for image in images)
    assert not np.array_equal(*images)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [image.step for image in events.Images("samples")] == [1, 2]
    size = images[0].shape
    assert {(image.height, image.width) for image in events.Images("samples")} == {size[:2]}


def test_numbers_that_are_not_finite_are_left_out(tmp_path, wandb):
    """The intervals of levels without a sample."""
    train(tmp_path, trackers=["wandb"], steps=1, batch_size=2)
    (points,) = wandb.server.values()
    levels = [name for name in points[1] if name.startswith("loss/level")]
    assert 1 <= len(levels) <= 2
    assert all(torch.tensor(float(value)).isfinite() for value in points[1].values())
