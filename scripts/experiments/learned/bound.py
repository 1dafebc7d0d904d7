"""Parts of the studies whose digits are trained and measured by the variational bound."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.table import markdown_table, mean_and_half_range
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import variational_bound
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO
from diffcore.schedules import LogLinear
from diffcore.training.data import Digits
from experiments.study import continue_study, create_trainer, group_rows, train_averaged

__all__ = [
    "COUNTS",
    "PARTS",
    "SHAPE",
    "continue_arms",
    "format_bounds",
    "measure_parts",
    "train_by_bound",
]

SHAPE = (1, 8, 8)
COUNTS = (25, 250)
"""Numbers of steps of the bound."""
PARTS = ("bits", "prior", "transitions", "decoder")
"""The bound and its parts."""


def continue_arms(
    out: Path,
    arms: Iterable[str],
    seeds: Iterable[int],
    steps: int,
    measure: Callable[..., Iterable[Mapping[str, Any]]],
) -> Iterator[str]:
    """Train and measure all arms and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        arms: names of the trained processes.
        seeds: seeds of the trainings.
        steps: optimizer steps of each training.
        measure: function (arm, seed, steps) that returns the measurements.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(name, seed, steps) for seed in seeds for name in arms]
    return continue_study(out, ("arm", "seed", "steps"), cells, measure)


def train_by_bound(
    network: Callable[[], nn.Module], seed: int, steps: int, **fields: Any
) -> Denoiser:
    """Train a network on the digits by the bound in continuous time.

    Args:
        network: function that builds the network.
        seed: seed of the training.
        steps: optimizer steps.
        **fields: further fields of the process.

    Returns:
        The network with averaged weights.
    """
    process = Process(LogLinear(-5.0, 8.0), shape=SHAPE, sigma_data=0.75, **fields)
    objective = Objective(ELBO(), corrected=True)
    with TemporaryDirectory() as folder:
        data = Digits("train")
        trainer = create_trainer(network, data, process, objective, Path(folder), seed, steps)
        return train_averaged(trainer)


def measure_parts(denoiser: Denoiser, count: int, parts: Sequence[str] = PARTS) -> dict[str, float]:
    """Measure the bound of the held-out scans, with the variance β̃ of the training loss.

    Args:
        denoiser: trained network.
        count: number of steps.
        parts: names of the parts.

    Returns:
        The bound and its parts in bits per dimension.
    """
    bound = variational_bound(denoiser, Digits("test").x0, 17, steps=count, variance=0.0)
    return {part: float(getattr(bound, part).mean()) for part in parts}


def format_bounds(
    measurements: list[dict[str, Any]], count: int, title: str, columns: Mapping[str, str]
) -> str:
    """Format the bounds of one number of steps: mean over seeds ± half of the range.

    Args:
        measurements: content of the study's file.
        count: number of steps of the bound.
        title: title of the column of arms.
        columns: key of the measurements -> title of its column.

    Returns:
        The table as Markdown.
    """
    rows = []
    for (arm,), found in group_rows(measurements, "arm").items():
        chosen = [row for row in found if row["count"] == count]
        cells = (mean_and_half_range([row[key] for row in chosen], 3) for key in columns)
        rows.append([arm, *cells])
    return markdown_table([title, *columns.values()], rows)
