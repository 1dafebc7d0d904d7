"""Runs of one rank of several: `python -m torch.distributed.run ... rank_runs.py FOLDER CASES`.

CASES is a JSON list of objects: the name of the run's folder and settings of the trainer.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffcore.training.averages.power_ema import Snapshots
from diffcore.training.checkpoints.checkpoint import Checkpoints
from diffcore.training.data import Digits
from diffcore.training.data.source import DataSource
from diffcore.training.ranks.sharding import Sharding
from diffcore.training.reports.validation import Validation
from tests.helpers.further_networks import ThreeNetworks
from tests.helpers.training_runs import PROCESS, LabelRecorder, make_trainer


class SeenDigits(DataSource):
    """The digits; each process appends the positions and indices that it reads to a file."""

    def __init__(self, folder: Path) -> None:
        self.digits, self.folder = Digits(), folder

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> Any:
        return self.digits[index]

    def item(self, index: int, seed: int, position: int) -> Any:
        with (self.folder / f"seen-{os.getpid()}.txt").open("a") as file:
            file.write(f"{position} {index}\n")
        return self[index]


def matching() -> dict[str, Any]:
    """Settings of distribution matching with a divergence and a discriminator with R1."""
    from diffcore.core.denoiser import Denoiser
    from diffcore.distillation import (
        DistributionMatching,
        Divergence,
        FeatureDiscriminator,
        NetworkTraining,
        OracleTeacher,
        Student,
    )

    torch.manual_seed(0)
    objective = DistributionMatching(
        teacher=OracleTeacher(Denoiser(LabelRecorder(), PROCESS)),
        student=Student(2),
        fake=NetworkTraining(2),
        divergence=Divergence("js", decay=0.5),
        discriminator=FeatureDiscriminator(r1=0.1, width=16),
        adversarial=0.1,
    )
    return {"objective": objective, "process": replace(PROCESS, estimate="consistency")}


def averaged() -> dict[str, Any]:
    """Settings of consistency training whose target has averaged weights."""
    from diffcore.distillation import Consistency, KnotIntervals
    from diffcore.objectives.weighting import MSE
    from diffcore.schedules import Flow

    intervals = KnotIntervals(first=4, last=4, weighting=MSE("sample"))
    process = replace(PROCESS, schedule=Flow(), prediction="flow_prediction")
    return {
        "objective": Consistency(intervals=intervals, target="average"),
        "process": replace(process, estimate="consistency"),
    }


OBJECTIVES = {
    "three": lambda: {"objective": ThreeNetworks()},
    "matching": matching,
    "averaged": averaged,
}
"""Settings of objectives that evaluate several networks, by the name in a case."""


def run(folder: Path, name: str, **settings: Any) -> None:
    """Train a case in folder/name."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    sharding = Sharding(**settings.pop("sharding", {}))
    checkpoints = Checkpoints(**settings.pop("checkpoints", {}))
    if settings.get("objective") in OBJECTIVES:
        settings |= OBJECTIVES[settings["objective"]]() | {"validation": Validation()}
    if settings.get("optimizer") == "fused":
        settings["optimizer"] = partial(torch.optim.AdamW, fused=True)
    options = {
        "checkpoints": checkpoints,
        "data": SeenDigits(folder),
        "steps": 20,
        "sharding": sharding,
        "snapshots": Snapshots((0.1,), every=10),
        "validation": Validation(Digits("test"), every=10, items=16, bins=2),
        "sample_every": 10,
        "sample_steps": 2,
    }
    make_trainer(folder, **(options | settings)).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # leaves the process group to the next run
    for case in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), **case)
