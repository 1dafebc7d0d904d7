"""How close MeanFlow comes to the exact mean velocity, over the steps of the training.

The teacher is the exact denoiser of a mixture in two dimensions, so that the targets have no
noise but that of the network's own derivative. Compared are two embeddings of both times: the
derivative of a sinusoid of c t is c times as large as the sinusoid, and it is a part of the target.
The mixtures are that of the study of flow maps, and one whose Gaussians are broad.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import TimeConditioning
from diffcore.distillation import MeanFlow, OracleTeacher
from diffcore.networks import Perceptron, TwoTimes
from experiments.students.flow_maps import velocity_error
from experiments.students.mixtures import (
    WIDTH,
    Problem,
    create_broad_problem,
    create_problem,
    create_process,
    train_step,
)
from experiments.study import continue_study, group_rows

__all__ = ["SETTINGS", "format_table", "run_study"]

MEASUREMENTS = 20
"""Number of measurements of a training, evenly spaced."""


class Setting(NamedTuple):
    """A mixture, and how a network receives both times.

    Args:
        time: largest value of the time input, at pure noise.
        interval: factor of the difference of both times in its embedding (`TwoTimes.scale`).
        create_problem: function that builds the mixture.
    """

    time: float
    interval: float
    create_problem: Callable[[], Problem] = partial(create_problem, 2)


SETTINGS = {
    "fast sinusoids": Setting(20.0, 10.0),
    "slow sinusoids": Setting(5.0, 1.0),
    "slow sinusoids, broad Gaussians": Setting(5.0, 1.0, create_broad_problem),
}


def run_study(
    out: Path, steps: int, names: Iterable[str] | None = None, seed: int = 0
) -> Iterator[str]:
    """Train the settings that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        steps: optimizer steps of each training.
        names: names of settings; None: all.
        seed: seed of the weights and of the draws.

    Yields:
        The lines that are appended to the file.
    """

    def measure(name: str, steps: int, seed: int) -> Iterator[Mapping[str, float]]:
        return train(SETTINGS[name], steps, seed)

    cells = [(name, steps, seed) for name in names or SETTINGS]
    return continue_study(out, ("setting", "steps", "seed"), cells, measure)


def train(setting: Setting, steps: int, seed: int) -> Iterator[Mapping[str, float]]:
    """Train a network of two times from random weights, with a learning rate that falls to 0.

    Args:
        setting: the mixture, and how the network receives both times.
        steps: optimizer steps.
        seed: seed of the weights and of the draws.

    Yields:
        The step, the error of U of the averaged weights, and the processor seconds.
    """
    problem = setting.create_problem()
    torch.manual_seed(seed)
    network = TwoTimes(lambda: Perceptron((2,), WIDTH, 4), scale=setting.interval)
    process = replace(
        create_process(2), estimate="mean_velocity", time=TimeConditioning("blend", setting.time)
    )
    denoiser = Denoiser(network, process).train()
    objective = MeanFlow(teacher=OracleTeacher(problem.oracle), share=0.75, power=0.0)
    networks = objective.networks(denoiser, torch.device("cpu"), lambda module: module)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    average = torch.optim.swa_utils.AveragedModel(
        network, avg_fn=lambda old, new, count: old + (new - old) * max(0.01, 1 / (count + 1))
    )
    seconds = -time.process_time()
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        train_step(denoiser, problem, objective, networks, optimizer, seed, step)
        average.update_parameters(network)
        if (step + 1) % max(1, steps // MEASUREMENTS) == 0:
            error = velocity_error(Denoiser(average.module, process).eval(), problem)
            denoiser.train()
            yield {
                "step": step + 1,
                "error": error,
                "processor_seconds": round(seconds + time.process_time()),
            }


def format_table(rows: Iterable[dict[str, Any]]) -> str:
    """The error of U over the steps.

    Args:
        rows: measurements.

    Returns:
        A Markdown table.
    """
    lines = []
    for (name, _), group in group_rows(rows, "setting", "steps").items():
        for row in group[3::4]:
            seconds = str(row["processor_seconds"])
            lines.append([name, str(row["step"]), f"{row['error']:.4f}", seconds])
    return markdown_table(["setting", "step", "error of U", "processor seconds"], lines)
