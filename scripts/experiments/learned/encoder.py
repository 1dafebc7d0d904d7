"""Whether a learned encoder of x_0 lowers the bound of the digits (DiffEnc).

Unconditional perceptrons are trained by the bound in continuous time between the same ends of λ:
without an encoder, with the fixed encoding α² x_0, and with learned encoders. Measured is the
variational bound of the held-out scans.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.table import markdown_table, mean_and_half_range
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.encoding.encoded_mean import find_mean_encoder
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import variational_bound
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO
from diffcore.schedules import LogLinear
from diffcore.training.data import Digits
from experiments.study import continue_study, create_trainer, group_rows, train_averaged

SHAPE = (1, 8, 8)
ARMS = ("none", "fixed, c = 0", "learned, c = 0", "learned, c = 1")
"""Encoders of the trained processes."""
COUNTS = (25, 250)
"""Numbers of steps of the bound."""
PARTS = ("bits", "prior", "transitions", "decoder")
"""The bound and its parts."""


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
    cells = [(name, seed, steps) for seed in seeds for name in ARMS]
    return continue_study(out, ("arm", "seed", "steps"), cells, _measure_cell)


def _measure_cell(name: str, seed: int, steps: int) -> list[Mapping[str, Any]]:
    """The measurements of one network, for each number of steps of the bound."""
    with TemporaryDirectory() as folder:
        denoiser = _train(name, seed, Path(folder), steps)
    return [{"count": count, **measure(denoiser, count)} for count in COUNTS]


def _train(arm: str, seed: int, folder: Path, steps: int) -> Denoiser:
    network, estimate = build(arm)
    schedule = LogLinear(-5.0, 8.0)
    process = Process(schedule, shape=SHAPE, sigma_data=0.75, estimate=estimate)
    objective = Objective(ELBO(), corrected=True)
    data = Digits("train")
    return train_averaged(create_trainer(network, data, process, objective, folder, seed, steps))


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
    x0 = Digits("test").x0
    bound = variational_bound(denoiser, x0, 17, steps=count, variance=0.0)
    found = {part: float(getattr(bound, part).mean()) for part in PARTS}
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
    rows = []
    for (arm,), found in group_rows(measurements, "arm").items():
        chosen = [row for row in found if row["count"] == count]
        cells = (
            mean_and_half_range([row[name] for row in chosen], 3) for name in (*PARTS, "change")
        )
        rows.append([arm, *cells])
    return markdown_table(["encoder", *PARTS, "size of h"], rows)
