"""Whether learned levels of the pixels lower the bound of the digits (MuLAN).

Unconditional perceptrons are trained by the bound in continuous time between the same ends of λ:
with one level for all pixels, with a learned level of each pixel, and with levels that depend on a
latent of the image. Measured is the variational bound of the held-out scans.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.network import find_learned_levels
from diffcore.networks import Perceptron
from diffcore.networks.learned_levels import LearnedLevelsNetwork
from experiments.learned import bound
from experiments.learned.bound import (
    COUNTS,
    SHAPE,
    continue_arms,
    format_bounds,
    measure_parts,
    train_by_bound,
)

__all__ = ["ARMS", "COUNTS", "PARTS", "SHAPE", "build", "format_table", "measure", "run_study"]

ARMS: dict[str, int | None] = {"shared": None, "learned": 0, "learned, 4 latents": 4}
"""The trained processes, by the number of latents; None: one level for all pixels."""
PARTS = (*bound.PARTS, "latent")
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
    return continue_arms(out, ARMS, seeds, steps, _measure_cell)


def _measure_cell(name: str, seed: int, steps: int) -> list[Mapping[str, Any]]:
    """The measurements of one network, for each number of steps of the bound."""
    network, levels = build(ARMS[name])
    denoiser = train_by_bound(network, seed, steps, levels=levels)
    return [{"count": count, **measure(denoiser, count)} for count in COUNTS]


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
    found = measure_parts(denoiser, count, PARTS)
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
    columns = {part: part for part in PARTS} | {"spread": "spread of τ"}
    return format_bounds(measurements, count, "levels", columns)
