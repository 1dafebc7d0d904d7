"""Reward tuning of a student of the digits: the reward is the ink, the sum of the pixels.

A student of few steps is tuned with several strengths β of the divergence to itself. Measured are
the reward, the divergence to the reference, and how far the digits are from real ones.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.table import markdown_table
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.distillation import RewardTuning, RunTeacher, Student
from diffcore.objectives.draw import SampleKey
from diffcore.run import Run
from diffcore.schedules import UniformBlend
from experiments.students.few_step import GRID, TRAINING, evaluate, run_command
from experiments.study import continue_study

__all__ = ["STRENGTHS", "format_table", "ink", "run_study"]

STRENGTHS = (1.0, 0.1)
STEPS, SAMPLES = 4, 500


def ink(x0: Tensor) -> Tensor:
    """The reward: the sum of the pixels, as they are drawn.

    Args:
        x0: samples (B, 1, 8, 8).

    Returns:
        Rewards (B,).
    """
    return x0.clamp(-1, 1).flatten(1).sum(1)


def no_reward(x0: Tensor) -> Tensor:
    """No reward, with which the loss is the divergence.

    Args:
        x0: samples (B, 1, 8, 8).

    Returns:
        Zeros (B,).
    """
    return 0 * x0.flatten(1).sum(1)


def run_study(reference: Path, folder: Path, out: Path, steps: int) -> Iterator[str]:
    """Measure the reference, and tune and measure the strengths that a file does not contain yet.

    Args:
        reference: folder of the run of a student of four steps, by `Consistency`.
        folder: folder of the tuned students.
        out: file of measurements, one JSON object in each line.
        steps: optimizer steps.

    Yields:
        The lines that are appended to the file.
    """

    def measure_cell(strength: float | None, training_steps: int) -> list[dict[str, Any]]:
        if strength is None:
            return [measure(reference, reference)]
        run = folder / f"RewardTuning-{strength}-{training_steps}"
        tune(reference, run, strength, training_steps)
        return [measure(run, reference)]

    cells = [(None, 0), *((strength, steps) for strength in STRENGTHS)]
    return continue_study(out, ("strength", "training_steps"), cells, measure_cell)


def tune(reference: Path, run: Path, strength: float, steps: int) -> None:
    """Tune a student.

    Args:
        reference: folder of the run of the student.
        run: folder of the tuned student.
        strength: β.
        steps: optimizer steps of batch 64.
    """
    arguments = {
        "reference": {"class_path": "RunTeacher", "init_args": {"folder": str(reference)}},
        "reward": f"{__name__}.ink",
        "strength": strength,
        "student": {"steps": STEPS, "grid": GRID},
    }
    spec = json.dumps({"class_path": "RewardTuning", "init_args": arguments})
    options = (f"--init={reference}", f"--objective={spec}", f"--folder={run}")
    trust = f"--trust={__name__}"
    rate = ("--lr.peak=1e-4", "--lr.warmup=5", "--ema.decay=0.8")
    run_command(
        "train", "digits-consistency", *options, *TRAINING, trust, f"--steps={steps}", *rate
    )


def measure(run: Path, reference: Path) -> dict[str, Any]:
    """Measure a student.

    Args:
        run: folder of the student.
        reference: folder of the student that it was tuned from.

    Returns:
        Mean brightness of the pixels, divergence, Fréchet distance and recognised share.
    """
    denoiser = Run(run).denoiser()
    brightness, divergence = measure_chains(denoiser, reference)
    values = evaluate(run, STEPS)
    return {"brightness": brightness, "divergence": divergence, **values}


@torch.no_grad()
def measure_chains(denoiser: Denoiser, reference: Path) -> tuple[float, float]:
    """Simulate the steps of a student.

    Args:
        denoiser: the student.
        reference: folder of the student that it was tuned from.

    Returns:
        The mean of the pixels of its samples, and the Kullback-Leibler divergence of its steps.
    """
    student = Student(STEPS, UniformBlend(**GRID["init_args"]))
    divergence = RewardTuning(
        reference=RunTeacher(str(reference)), reward=no_reward, student=student
    )
    reward = RewardTuning(reference=RunTeacher(str(reference)), reward=ink, student=student)
    labels = torch.arange(SAMPLES) % 10
    draw = divergence.draw(
        denoiser.process, SampleKey(0, 0, torch.arange(SAMPLES), SAMPLES), torch.device("cpu")
    )
    networks = divergence.networks(denoiser, torch.device("cpu"), lambda network: network)
    x0 = torch.zeros(SAMPLES, *denoiser.process.shape)
    losses = [
        float(objective(denoiser, x0, labels, draw, networks=networks).mean())
        for objective in (divergence, reward)
    ]
    return (losses[0] - losses[1]) / x0[0].numel(), losses[0]


def format_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of docs/few-step.md.

    Args:
        rows: measurements.

    Returns:
        A table in Markdown.
    """
    lines = []
    for row in rows:
        name = "the reference" if row["strength"] is None else f"β = {row['strength']:g}"
        values = (row["brightness"], row["divergence"], row["frechet_distance"])
        cells = [
            str(row["training_steps"]),
            f"{values[0]:.3f}",
            f"{values[1]:.1f}",
            f"{values[2]:.3f}",
        ]
        lines.append([name, *cells, f"{row['label_accuracy']:.3f}"])
    header = [
        "student",
        "training steps",
        "mean pixel",
        "divergence",
        "Fréchet distance",
        "recognised",
    ]
    return markdown_table(header, lines)
