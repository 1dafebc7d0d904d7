"""Whether learned levels of the pixels lower the bound of the digits (MuLAN).

Unconditional perceptrons are trained by the bound in continuous time between the same ends of λ:
with one level for all pixels, with a learned level of each pixel, and with levels that depend on a
latent of the image. Measured is the variational bound of the held-out scans.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.table import markdown_table, mean_and_half_range

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import find_learned_levels
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import variational_bound
from diffcore.networks import Perceptron
from diffcore.networks.learned_levels import LearnedLevelsNetwork
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO
from diffcore.schedules import LogLinear
from diffcore.training.data import Digits
from experiments.study import continue_study, create_trainer, group_rows, train_averaged

SHAPE = (1, 8, 8)
ARMS: dict[str, int | None] = {"shared": None, "learned": 0, "learned, 4 latents": 4}
"""The trained processes, by the number of latents; None: one level for all pixels."""
COUNTS = (25, 250)
"""Numbers of steps of the bound."""
PARTS = ("bits", "prior", "transitions", "decoder", "latent")
"""The bound and its parts."""


def run_study(out: Path, seeds: Iterable[int], steps: int) -> Iterator[str]:
    """Train and measure all processes and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings.
        steps: optimizer steps of each training.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(name, seed, steps) for seed in seeds for name in ARMS]
    return continue_study(out, ("arm", "seed", "steps"), cells, _measure_cell)


def _measure_cell(name: str, seed: int, steps: int) -> list[Mapping[str, Any]]:
    """The measurements of one network, for each number of steps of the bound."""
    with TemporaryDirectory() as folder:
        denoiser = _train(ARMS[name], seed, Path(folder), steps)
    return [{"count": count, **measure(denoiser, count)} for count in COUNTS]


def _train(latent: int | None, seed: int, folder: Path, steps: int) -> Denoiser:
    network, levels = build(latent)
    process = Process(LogLinear(-5.0, 8.0), shape=SHAPE, sigma_data=0.75, levels=levels)
    objective = Objective(ELBO(), corrected=True)
    data = Digits("train")
    return train_averaged(create_trainer(network, data, process, objective, folder, seed, steps))


def build(latent: int | None, width: int = 256) -> tuple[Any, Any]:
    """A function that builds the network of an arm, and the levels of its process.

    Args:
        latent: number of latents of the levels; None: shared levels.
        width: hidden features of the perceptron.

    Returns:
        The function, and shared or learned.
    """
    if latent is None:
        return partial(Perceptron, SHAPE, width), "shared"
    inner = partial(Perceptron, SHAPE, width, inputs=2)
    return partial(LearnedLevelsNetwork, inner, SHAPE, latent, channels=True), "learned"


def measure(denoiser: Denoiser, count: int) -> dict[str, float]:
    """Measure the bound of the held-out scans, with the variance β̃ of the training loss.

    Args:
        denoiser: trained network.
        count: number of steps.

    Returns:
        The bound and its parts in bits per dimension, and `spread`, the standard deviation over the
        pixels of the learned time at t = ½ and z = 0.
    """
    bound = variational_bound(denoiser, Digits("test").x0, 17, steps=count, variance=0.0)
    found = {part: float(getattr(bound, part).mean()) for part in PARTS}
    learned = find_learned_levels(denoiser.network)
    if learned is None:
        return {**found, "spread": 0.0}
    z = torch.zeros(1, learned.levels.latent)
    with torch.no_grad():
        time, _ = learned.levels(torch.full((1, 1, 1, 1), 0.5), z)
    return {**found, "spread": float(time.std())}


def format_table(measurements: list[dict[str, Any]], count: int) -> str:
    """Format the bounds of one number of steps: mean over seeds ± half of the range.

    Args:
        measurements: content of the study's file.
        count: number of steps of the bound.

    Returns:
        The table as Markdown.
    """
    rows = []
    for (arm,), found in group_rows(measurements, "arm").items():
        chosen = [row for row in found if row["count"] == count]
        cells = (
            mean_and_half_range([row[name] for row in chosen], 3) for name in (*PARTS, "spread")
        )
        rows.append([arm, *cells])
    return markdown_table(["levels", *PARTS, "spread of τ"], rows)
