"""Runs with named conditions: `python -m torch.distributed.run ... condition_runs.py FOLDER`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffcore.core.conditions import ConditionRecord
from diffcore.core.process import Process
from diffcore.training.data import Digits, LowResolution, MaskedImages
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import make_trainer

SHAPES = {"low": (1, 4, 4), "masked": (1, 8, 8), "mask": (1, 8, 8)}


class ConditionedLayer(nn.Module):
    """A linear layer of x and the conditions of `SHAPES`; `low` has a learned absent value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64 + 16 + 64 + 64, 64)
        self.absent_low = nn.Parameter(torch.full((1, 4, 4), 0.1))
        self.labels = nn.Embedding(11, 64)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor, **given: Tensor) -> Tensor:
        absent = given["low_absent"].view(-1, 1, 1, 1)
        low = torch.where(absent, self.absent_low, given["low"])
        parts = [each.flatten(1) for each in (x, low, given["masked"], given["mask"])]
        return (self.layer(torch.cat(parts, 1)) + self.labels(class_labels)).view_as(x)


def process(dropout: float = 0.5) -> Process:
    """The process of digits with three conditions, of which two are dropped independently."""
    conditions = {
        "low": ConditionRecord(SHAPES["low"], -1, 1, dropout, absent="learned"),
        "masked": ConditionRecord(SHAPES["masked"], -1, 1, dropout),
        "mask": ConditionRecord(SHAPES["mask"], 0, 1),
    }
    return Process(shape=(1, 8, 8), classes=10, dropout=0.1, conditions=conditions)


def conditioned_trainer(folder: Path, dropout: float = 0.5, **options: Any) -> Trainer:
    """A trainer of six steps on digits with their low resolution and with holes.

    Args:
        folder: directory that the run is written to.
        dropout: share of samples without a condition.
        options: arguments of `Trainer` that replace the defaults.

    Returns:
        The trainer.
    """
    data = MaskedImages(LowResolution(Digits(), 2))
    defaults = {"network": ConditionedLayer, "data": data, "process": process(dropout)}
    return make_trainer(folder, **(defaults | {"clip": 0.1} | options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    conditioned_trainer(Path(sys.argv[1]), accumulation=2).train()
