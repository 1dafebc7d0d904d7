"""Whether a learned variance makes DDPM's few steps better than a fixed one, on the digits.

Perceptrons with the mean alone, and with a variance that `Variational` trains for steps of 1/1000
or of 1/10, draw 500 digits in 10 and 25 steps of DDPM without guidance. Measured are the Fréchet
distances to the training and to the held-out scans in pixels, and the variational bound of the
held-out scans for the same steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.table import markdown_table, mean_and_half_range

from diffcore.core.denoiser import Denoiser
from diffcore.evaluation.likelihood import variational_bound
from diffcore.networks import Perceptron
from diffcore.objectives.objective import Objective
from diffcore.objectives.variational import Variational
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDPM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Trailing
from diffcore.training.data import Digits
from experiments.learned.bound import continue_arms
from experiments.study import (
    create_trainer,
    group_rows,
    sample_seeds,
    train_averaged,
)
from experiments.training import digits_process, scan_distances

ARMS: dict[str, Variational | None] = {
    "mean alone": None,
    "learned, 1000 steps": Variational(0.001, steps=1000, values=17),
    "learned, 10 steps": Variational(0.1, steps=10, values=17),
}
"""The trained networks, by the steps of the bound; the factor of a term is 1 in both."""
COUNTS = (10, 25)
"""Numbers of steps of sampling."""
TABLES = {
    "train": "Fréchet distance to the training scans",
    "test": "Fréchet distance to the held-out scans",
    "bits": "Variational bound of the held-out scans in bits per dimension",
}
"""Measured quantity -> title of its table."""


def run_study(out: Path, seeds: Iterable[int], steps: int) -> Iterator[str]:
    """Train and measure all networks and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings.
        steps: optimizer steps of each training.

    Yields:
        The lines that are appended to the file.
    """
    return continue_arms(out, ARMS, seeds, steps, _measure_cell)


def _measure_cell(name: str, seed: int, steps: int) -> list[Mapping[str, Any]]:
    """The measurements of one network, for each variance and number of steps of sampling."""
    with TemporaryDirectory() as folder:
        denoiser = _train(ARMS[name], seed, Path(folder), steps)
    variances = (0.0, 1.0) if ARMS[name] is None else (None, 0.0, 1.0)
    return [
        {"variance": v, "count": count, **measure(denoiser, v, count, seed)}
        for v in variances
        for count in COUNTS
    ]


def _train(variational: Variational | None, seed: int, folder: Path, steps: int) -> Denoiser:
    is_learned = variational is not None
    process = digits_process(Cosine(), "v_prediction", "learned" if is_learned else "fixed")
    network = partial(Perceptron, (1, 8, 8), 256, 4, 10, is_learned)
    objective = Objective(MSE("v_prediction"), variational=variational)
    data = Digits("train")
    return train_averaged(create_trainer(network, data, process, objective, folder, seed, steps))


def measure(
    denoiser: Denoiser, variance: float | None, count: int, seed: int, per_label: int = 50
) -> dict[str, float]:
    """Measure the samples of one variance, and the bound of the same steps.

    Args:
        denoiser: trained network.
        variance: v of DDPM; None is that of the network.
        count: number of steps.
        seed: seed of the samples and of the bound.
        per_label: samples of each digit.

    Returns:
        Distances `train` and `test`, and `bits` per dimension.
    """
    labels, held_out = torch.arange(10).repeat_interleave(per_label), Digits("test")
    seeds = sample_seeds(seed, len(labels))
    x = sample(
        denoiser, DDPM(variance), Trailing(), count, seeds=seeds, condition=labels, batch_size=100
    ).x
    bound = variational_bound(
        denoiser, held_out.x0, 17, steps=count, variance=variance, condition=held_out.labels
    )
    train, test = scan_distances(x)
    return {"train": train, "test": test, "bits": float(bound.bits.mean())}


def format_table(measurements: list[dict[str, Any]], quantity: str) -> str:
    """Format one quantity: mean over seeds ± half of the range.

    Args:
        measurements: content of the study's file.
        quantity: name among `TABLES`.

    Returns:
        The table as Markdown.
    """
    names = {0.0: "β̃ (v = 0)", 1.0: "β (v = 1)", None: "learned"}
    rows = []
    for (arm, v), found in group_rows(measurements, "arm", "variance").items():
        cells = (
            mean_and_half_range([row[quantity] for row in found if row["count"] == count], 2)
            for count in COUNTS
        )
        rows.append([arm, names[v], *cells])
    return markdown_table(["network", "variance", *(f"{n} steps" for n in COUNTS)], rows)
