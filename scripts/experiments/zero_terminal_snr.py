"""How zero terminal SNR changes the mean brightness that samples can have.

    x_0 = m + (1 - |m|) (tint + waves) / 2,   m uniform in [-1, 1]

Tint and waves have mean zero, so m is the mean over pixels and channels. If a schedule ends at
α_T > 0, the noisiest training images still contain a part of m, and sampling starts from noise
without it.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table, mean_and_half_range
from torch import Tensor
from torch.utils.data import Dataset

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.oracle import EmpiricalDistribution
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.report.figures import create_figure, save_figure
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Discrete, Grid, Leading, Schedule, Trailing, ZeroTerminalSNR
from experiments.study import (
    continue_study,
    create_trainer,
    group_rows,
    sample_seeds,
    small_unet,
    train_averaged,
)

SIZE = 16
"""Height and width of the images in pixels."""
IMAGES = 4000
"""Number of training images."""
WAVES = 3
"""Number of cosines in each image."""
STEPS = 50
TRAINING_STEPS = 1000
COUNT = 500
"""Number of samples of each measurement."""
END = 0.6
"""Mean brightness beyond which lies a share of 0.4 of the data."""
BINS = 44
SPAN = 1.1
"""Largest mean brightness of the histograms, which have BINS bins."""
FLAWED = Discrete("scaled_linear", None, 0.00085, 0.012)
"""Stable Diffusion's table: α_T = 0.068."""
GRIDS: dict[str, Grid] = {"Leading(1)": Leading(1), "Trailing()": Trailing()}


class SchedulePair(NamedTuple):
    """A schedule and the output of its network; no output for the exact denoiser of the images."""

    schedule: Schedule
    prediction: PredictionType | None


VARIANTS = {
    "scaled_linear, ε": SchedulePair(FLAWED, "epsilon"),
    "scaled_linear, v": SchedulePair(FLAWED, "v_prediction"),
    "zero terminal SNR, v": SchedulePair(ZeroTerminalSNR(FLAWED), "v_prediction"),
    "scaled_linear, exact": SchedulePair(FLAWED, None),
    "zero terminal SNR, exact": SchedulePair(ZeroTerminalSNR(FLAWED), None),
}


class BrightnessFields(Dataset[Tensor]):
    """Smooth fields of colour whose mean brightness is uniform between black and white.

    Args:
        count: number of images; the first images do not depend on it.
        seed: seed of all images.
    """

    def __init__(self, count: int = IMAGES, seed: int = 0) -> None:
        u = uniform(seed, Stream.ORACLE, torch.arange(count), 2 + 6 * WAVES).float()
        m, hue, waves = 2 * u[:, 0] - 1, u[:, 1], u[:, 2:].unflatten(1, (WAVES, 6))
        channel = torch.arange(3) / 3
        tint = torch.cos(2 * math.pi * (hue[:, None] + channel))[..., None, None]
        shape = (tint + _waves(waves)) / 2
        self.x0 = m.view(-1, 1, 1, 1) + (1 - m.abs()).view(-1, 1, 1, 1) * shape

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> Tensor:
        return self.x0[index]


def _waves(u: Tensor) -> Tensor:
    """(N, 3, SIZE, SIZE) cosines of one or two periods within [-1, 1], with mean zero.

    u (N, WAVES, 6) in (0, 1) holds periods across and down, the phase, and heights of 3 channels.
    """
    pixel = torch.arange(SIZE) / SIZE
    across, down = 1 + (2 * u[..., 0]).floor(), (3 * u[..., 1]).floor()
    phase = (
        across[..., None, None] * pixel
        + down[..., None, None] * pixel[:, None]
        + u[..., 2, None, None]
    )
    heights = u[..., 3:] / WAVES
    return torch.einsum("nwc,nwij->ncij", heights, torch.cos(2 * math.pi * phase))


def brightness(x: Tensor) -> Tensor:
    """(N,) means over pixels and channels."""
    return x.flatten(1).mean(1)


def _process(schedule: Schedule, prediction: PredictionType) -> Process:
    # σ_data = 1 starts sampling from N(0, I), as pipelines do.
    return Process(schedule, prediction, shape=(3, SIZE, SIZE), sigma_data=1.0)


def create_denoiser(
    variant: SchedulePair, seed: int, steps: int = TRAINING_STEPS
) -> DenoiserProtocol:
    """Train a network, or build the exact denoiser of the training images.

    Args:
        variant: schedule and output of the network.
        seed: seed of the training.
        steps: optimizer steps.

    Returns:
        The averaged network or the exact denoiser.
    """
    if variant.prediction is None:
        process = _process(variant.schedule, "v_prediction")
        return EmpiricalDistribution(BrightnessFields().x0, process=process)
    process = _process(variant.schedule, variant.prediction)
    network, objective = partial(small_unet, SIZE, 3, (16, 32)), Objective(MSE(variant.prediction))
    with TemporaryDirectory() as folder:
        return train_averaged(
            create_trainer(
                network, BrightnessFields(), process, objective, Path(folder), seed, steps
            )
        )


def measure(means: Tensor) -> dict[str, Any]:
    """Measure the distribution of mean brightnesses.

    Args:
        means: (N,) mean brightness of each image.

    Returns:
        std: standard deviation, 0.577 for the data; beyond: share beyond ±END; distance:
        Wasserstein-1, ∫ |F⁻¹(q) - (2q - 1)| dq, to the uniform distribution (0.02 for as many
        images of the data); histogram: counts in BINS bins from -SPAN to SPAN.
    """
    quantiles = 2 * (torch.arange(len(means)) + 0.5) / len(means) - 1
    return {
        "std": means.std().item(),
        "beyond": (means.abs() > END).double().mean().item(),
        "distance": (means.sort().values - quantiles).abs().mean().item(),
        "histogram": torch.histc(means.clamp(-SPAN, SPAN), BINS, -SPAN, SPAN).int().tolist(),
    }


def run_study(
    out: Path, seeds: Iterable[int], steps: int = TRAINING_STEPS, count: int = COUNT
) -> Iterator[str]:
    """Measure all variants and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the samples.
        steps: optimizer steps.
        count: number of samples.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(name, seed) for seed in seeds for name in VARIANTS]
    measure_cell = partial(measure_variant, steps=steps, count=count)
    return continue_study(out, ("arm", "seed"), cells, measure_cell)


def measure_variant(name: str, seed: int, steps: int, count: int) -> Iterator[dict[str, Any]]:
    """Measure a variant on each grid.

    Args:
        name: name of the variant.
        seed: seed of the training and of the samples.
        steps: optimizer steps.
        count: number of samples.

    Yields:
        The measurements of a grid.
    """
    denoiser = create_denoiser(VARIANTS[name], seed, steps)
    for grid, knots in GRIDS.items():
        seeds = sample_seeds(seed, count)
        x = sample(denoiser, DDIM(), knots, STEPS, seeds=seeds, batch_size=100).x
        yield {"grid": grid, **measure(brightness(x))}


def measure_data(count: int = COUNT) -> dict[str, Any]:
    """Measure images of the data that are not training images.

    Args:
        count: number of images.

    Returns:
        The measurements, as of a variant.
    """
    x0 = BrightnessFields(count, seed=1).x0
    return {"arm": "images", "grid": "", "seed": 0, **measure(brightness(x0))}


def format_table(measurements: list[dict[str, Any]]) -> str:
    """Format the measurements: mean over seeds, and half the range.

    Args:
        measurements: content of the study's file.

    Returns:
        The table as Markdown.
    """
    header = ["schedule, network", "grid", "std", "beyond ±0.6", "beyond ±1", "distance"]
    rows = []
    for (name, grid), seeds in group_rows(measurements, "arm", "grid").items():
        columns = [
            [row["std"] for row in seeds],
            [row["beyond"] for row in seeds],
            [share_outside(row["histogram"]) for row in seeds],
            [row["distance"] for row in seeds],
        ]
        rows.append([name, grid, *(mean_and_half_range(values, 3) for values in columns)])
    return markdown_table(header, rows)


def share_outside(histogram: list[int]) -> float:
    """The share beyond ±1, where the data has no images."""
    bins = round(BINS * (SPAN - 1) / (2 * SPAN))
    return sum(histogram[:bins] + histogram[-bins:]) / sum(histogram)


def draw(measurements: list[dict[str, Any]], out: Path) -> None:
    """Draw histograms of the mean brightness over all seeds, and the density of the data (dashed).

    Values beyond the outermost bin are counted in it.

    Args:
        measurements: content of the study's file.
        out: image to write.
    """
    from matplotlib import rcParams

    figure, axes = create_figure(len(VARIANTS), width=3.2, height=3.4)
    ink = rcParams["text.color"]
    edges = torch.linspace(-SPAN, SPAN, BINS + 1).tolist()
    for axis, name in zip(axes, VARIANTS, strict=True):
        for grid, colour in zip(GRIDS, ("0.6", ink), strict=True):
            counts = torch.tensor(
                [
                    row["histogram"]
                    for row in measurements
                    if (row["arm"], row["grid"]) == (name, grid)
                ],
                dtype=torch.float64,
            ).sum(0)
            density = (counts / counts.sum() * BINS / (2 * SPAN)).tolist()
            label = grid if name == next(iter(VARIANTS)) else None
            axis.stairs(density, edges, fill=colour != ink, color=colour, label=label, lw=1.5)
        data = axis.plot([-1, -1, 1, 1], [0, 0.5, 0.5, 0], "--", color=ink, lw=1)
        axis.set(title=name, xlabel="mean brightness", ylim=(0, 1.4))
    axes[0].set_ylabel("density")
    axes[0].legend([*axes[0].patches, *data], [*GRIDS, "data"], loc="upper left", fontsize=8)
    save_figure(figure, out)
