"""Short training runs of a tiny network, runs that end early, and what a run writes."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffcore.core.process import Process
from diffcore.training import loop
from diffcore.training.averages.ema import Decay
from diffcore.training.checkpoints import checkpoint
from diffcore.training.checkpoints.resume import start_or_resume
from diffcore.training.construction import build_state
from diffcore.training.data import Digits
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.reports.reporting import Reporter
from diffcore.training.state import TrainState
from diffcore.training.trainer import Trainer

STEPS = 6
PROCESS = Process(shape=(1, 8, 8), classes=10, dropout=0.1)
UNBOUNDED = replace(PROCESS, low=-math.inf, high=math.inf)
GREY, HUGE = torch.zeros(1, 8, 8), torch.full((1, 8, 8), 3e38)  # its squared error is infinite


class LabelRecorder(nn.Module):
    """A perceptron on 8x8 images that records the labels of each call in `calls`."""

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.labels = nn.Embedding(classes + 1, 32)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(32, 64), nn.Dropout(dropout), nn.SiLU(), nn.Linear(64, 64)
        )
        self.image = nn.Linear(64, 32)
        self.register_buffer("training_calls", torch.tensor(0))
        self.calls: list[Tensor | None] = []

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.training_calls += self.training
        self.calls.append(class_labels)
        label = 0 if class_labels is None else self.labels(class_labels)
        hidden = self.image(x.flatten(1)) + self.time(time[:, None] / 1000) + label
        return self.layers(hidden).view_as(x)


class ListDataset(Dataset[Any]):
    """A data set of the given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def make_trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer of six steps on digits.

    Args:
        folder: directory that the run is written to.
        options: arguments of `Trainer` that replace the defaults.

    Returns:
        The trainer.
    """
    defaults = {
        "network": LabelRecorder,
        "data": Digits(),
        "process": PROCESS,
        "optimizer": torch.optim.AdamW,
        "folder": folder,
        "steps": STEPS,
        "lr": LearningRate(1e-3, warmup=10),
        "ema": Decay(0.9),
        "batch_size": 16,
        "log_every": 1,
        "trackers": [],
    }
    return Trainer(**(defaults | options))


def train(folder: Path, **options: Any) -> TrainState:
    """The state after the last step of `make_trainer(folder, **options)`."""
    return make_trainer(folder, **options).train()


@contextmanager
def crash_at_checkpoint(step: int) -> Iterator[None]:
    """Inside, a run ends as by a crash once the checkpoint of a step is written."""
    save = loop.save

    def save_and_crash(state: TrainState, *arguments: Any) -> None:
        save(state, *arguments)
        if state.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_and_crash)
        yield


def crash_after(trainer: Trainer, step: int) -> None:
    """Train until the checkpoint of a step is written, then end as by a crash."""
    with crash_at_checkpoint(step), pytest.raises(KeyboardInterrupt):
        trainer.train()


def refused_run(trainer: Trainer, message: str) -> tuple[TrainState, str]:
    """The state of a run that stops with a ValueError that matches `message`, and its text."""
    state = build_state(trainer)
    reporter = Reporter(trainer, state.accelerator)
    start_or_resume(state, reporter.message)
    with pytest.raises(ValueError, match=message) as caught:
        loop.run(state, reporter)
    return state, str(caught.value)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(folder: Path, step: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a run's checkpoint after `step` steps."""
    return checkpoint.read(folder / "checkpoints" / f"step-{step:08d}").tensors


def assert_equal_checkpoints(
    found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]
) -> None:
    """Every tensor of every file of two checkpoints is bit-equal."""
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found[file][name], value), (file, name)


def check_resumed_run(folder: Path, **options: Any) -> TrainState:
    """The state of a whole run, whose bytes a run that was resumed after step 3 has too."""
    whole = train(folder / "whole", **options)
    crash_after(make_trainer(folder / "part", **options), 3)
    train(folder / "part", resume=True, **options)
    found, expected = (read_checkpoint(folder / name) for name in ("part", "whole"))
    assert_equal_checkpoints(found, expected)
    return whole


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its path in it, but speeds of the machine."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "speed.jsonl"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
