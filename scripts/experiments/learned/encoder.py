"""Whether a learned encoder of x_0 lowers the bound of the digits (DiffEnc).

Unconditional perceptrons are trained by the bound in continuous time between the same ends of λ:
without an encoder, with the fixed encoding α² x_0, and with learned encoders. Measured is the
variational bound of the held-out scans.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.encoding.encoded_mean import find_mean_encoder
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.training.data import Digits
from experiments.learned.bound import (
    COUNTS,
    PARTS,
    SHAPE,
    continue_arms,
    format_bounds,
    measure_parts,
    train_by_bound,
)

__all__ = ["ARMS", "COUNTS", "PARTS", "SHAPE", "build", "format_table", "measure", "run_study"]

ARMS = ("none", "fixed, c = 0", "learned, c = 0", "learned, c = 1")
"""Encoders of the trained processes."""


class NoEncoder(nn.Module):
    """h = 0, so that the encoding is the fixed linear one."""

    def forward(self, x0: Tensor, number: Tensor) -> Tensor:
        return torch.zeros_like(x0)


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
    network, estimate = build(name)
    denoiser = train_by_bound(network, seed, steps, estimate=estimate)
    return [{"count": count, **measure(denoiser, count)} for count in COUNTS]


def build(arm: str, width: int = 256) -> tuple[Any, Any]:
    """A function that builds the network of an arm, and the estimate of its process.

    Args:
        arm: one of `ARMS`.
        width: hidden features of the perceptron; the encoder has a quarter of them.

    Returns:
        The function, and posterior_mean or encoded_mean.
    """
    inner = partial(Perceptron, SHAPE, width)
    if arm == "none":
        return inner, "posterior_mean"
    encoder = NoEncoder if arm.startswith("fixed") else partial(Perceptron, SHAPE, width // 4, 2)
    share = float(arm.endswith("1"))
    return partial(MeanEncoderNetwork, inner, encoder, share), "encoded_mean"


def measure(denoiser: Denoiser, count: int) -> dict[str, float]:
    """Measure the bound of the held-out scans, with the variance β̃ of the training loss.

    Args:
        denoiser: trained network.
        count: number of steps.

    Returns:
        The bound and its parts in bits per dimension, and `change`, the root of the mean square of
        h over pixels, scans and levels: 0 where nothing is learned.
    """
    found, x0 = measure_parts(denoiser, count), Digits("test").x0
    encoder = find_mean_encoder(denoiser.network)
    if encoder is None:
        return {**found, "change": 0.0}
    depth = ((torch.arange(len(x0)) + 0.5) / len(x0)).view(-1, 1, 1, 1)
    with torch.no_grad():
        return {**found, "change": float(encoder.residual(x0, depth).square().mean().sqrt())}


def format_table(measurements: list[dict[str, Any]], count: int) -> str:
    """Format the bounds of one number of steps: mean over seeds ± half of the range.

    Args:
        measurements: content of the study's file.
        count: number of steps of the bound.

    Returns:
        The table as Markdown.
    """
    columns = {part: part for part in PARTS} | {"change": "size of h"}
    return format_bounds(measurements, count, "encoder", columns)
