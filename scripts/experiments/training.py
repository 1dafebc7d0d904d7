"""How soon each combination of schedule, loss weight and objective makes good samples of digits.

All runs share the network, data order, noise and learning rate. After 100, 200, 400 and 800 steps
the averaged network draws 500 digits over common λ knots; measured are their Fréchet distances to
the training scans and to the held-out scans.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.table import markdown_table, mean_and_half_range
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process, VarianceType
from diffcore.evaluation.digits import to_scan_units
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.level_sampling import LearnedSchedule, SecondMoment
from diffcore.objectives.objective import Objective, TimeSampling
from diffcore.objectives.weighting import MSE, P2, DebiasedWeight, MinSNR
from diffcore.report.figures import create_figure, save_figure
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Discrete, Laplace, Normal, Schedule, UniformLogSNR
from diffcore.training.data import Digits
from diffcore.training.trainer import Trainer
from experiments.study import (
    BATCH,
    continue_study,
    create_trainer,
    sample_seeds,
    small_unet,
    train_averaged,
)

POINTS = (100, 200, 400, 800)
"""Numbers of optimizer steps after which samples are drawn."""
KNOTS = UniformLogSNR(-9.0, 7.0)
"""Grid that lies within all compared schedules."""


@dataclass(frozen=True)
class TrainingVariant:
    """One of the compared trainings.

    Args:
        schedule: distribution of the training noise levels.
        prediction: output of the network.
        objective: loss and its weight.
    """

    schedule: Schedule
    prediction: PredictionType
    objective: Objective


VARIANTS: dict[str, TrainingVariant] = {
    "linear, ε": TrainingVariant(Discrete(), "epsilon", Objective(MSE("epsilon"))),
    "cosine, v": TrainingVariant(Cosine(), "v_prediction", Objective(MSE("v_prediction"))),
    "cosine, v, Min-SNR": TrainingVariant(Cosine(), "v_prediction", Objective(MinSNR())),
    "cosine, v, Debiased": TrainingVariant(Cosine(), "v_prediction", Objective(DebiasedWeight())),
    "cosine, v, P2": TrainingVariant(Cosine(), "v_prediction", Objective(P2())),
    "Laplace(0, 0.5), v": TrainingVariant(
        Laplace(), "v_prediction", Objective(MSE("v_prediction"))
    ),
    "Normal(0, 2), v": TrainingVariant(Normal(), "v_prediction", Objective(MSE("v_prediction"))),
    "cosine, v, DDPM-IP": TrainingVariant(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), perturbation=0.1)
    ),
    "cosine, v, OT": TrainingVariant(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), coupling=OptimalTransport(BATCH))
    ),
    "cosine, v, second moment": TrainingVariant(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), resampler=SecondMoment())
    ),
    "cosine, v, learned": TrainingVariant(
        Cosine(), "v_prediction", Objective(MSE("v_prediction"), resampler=LearnedSchedule())
    ),
}


def digits_process(
    schedule: Schedule, prediction: PredictionType, variance: VarianceType = "fixed"
) -> Process:
    """The process of a class-conditional network of the digits.

    Args:
        schedule: noise schedule.
        prediction: output of the network.
        variance: whether the network has a learned variance.

    Returns:
        The process.
    """
    return Process(
        schedule,
        prediction,
        shape=(1, 8, 8),
        sigma_data=0.75,
        classes=10,
        dropout=0.1,
        variance=variance,
    )


digits_unet = partial(small_unet, 8, 1, (24, 56), 11)
"""The class-conditional network of the study, with half a million parameters."""


def digits_trainer(
    variant: TrainingVariant,
    levels: TimeSampling,
    seed: int,
    folder: Path,
    steps: int,
    network: Callable[[], torch.nn.Module] = digits_unet,
    resume: bool = False,
) -> Trainer:
    """Create the training of a variant on the digits.

    Args:
        variant: schedule, prediction type and objective.
        levels: whether the noise levels of a batch are stratified or independent.
        seed: seed of everything random in the run.
        folder: folder of the run.
        steps: optimizer steps.
        network: function that builds the network.
        resume: whether the folder holds the first steps of this run.

    Returns:
        The trainer, which has not started.
    """
    process = digits_process(variant.schedule, variant.prediction)
    objective = replace(variant.objective, levels=levels)
    data = Digits("train")
    return create_trainer(network, data, process, objective, folder, seed, steps, resume=resume)


def measure(
    variant: TrainingVariant,
    levels: TimeSampling,
    seed: int,
    points: Iterable[int] = POINTS,
    per_label: int = 50,
) -> dict[int, Any]:
    """Measure a variant during its training, which is resumed from one number of steps to the next.

    Args:
        variant: schedule, prediction type and objective.
        levels: whether the noise levels of a batch are stratified or independent.
        seed: seed of the training and of the samples.
        points: numbers of steps.
        per_label: samples of each digit.

    Returns:
        Distances to the training and to the held-out scans, by the number of steps.
    """
    points, distances = sorted(points), {}
    with TemporaryDirectory() as folder:
        for index, steps in enumerate(points):
            trainer = digits_trainer(variant, levels, seed, Path(folder), steps, resume=index > 0)
            distances[steps] = measure_distances(train_averaged(trainer), seed, per_label)
    return distances


def measure_distances(denoiser: Denoiser, seed: int, per_label: int) -> tuple[float, float]:
    """Measure the Fréchet distances of samples of all digits, in pixels.

    Args:
        denoiser: trained network.
        seed: seed of the samples.
        per_label: samples of each digit.

    Returns:
        The distances to the training scans and to the held-out scans.
    """
    labels = torch.arange(10).repeat_interleave(per_label)
    seeds = sample_seeds(seed, len(labels))
    samples = sample(denoiser, DDIM(), KNOTS, 20, seeds=seeds, condition=labels, batch_size=100).x
    return scan_distances(samples)


def scan_distances(x: Tensor) -> tuple[float, float]:
    """The Fréchet distances of digits to the scans, in pixels from 0 to 16.

    Args:
        x: (N, 1, 8, 8) digits within [-1, 1].

    Returns:
        The distances to the training scans and to the held-out scans.
    """
    to_train, to_test = (
        frechet_distance(to_scan_units(x), to_scan_units(Digits(split).x0))
        for split in ("train", "test")
    )
    return to_train, to_test


def run_study(
    out: Path,
    seeds: Iterable[int],
    variants: Mapping[str, TrainingVariant] = VARIANTS,
    points: Iterable[int] = POINTS,
) -> Iterator[str]:
    """Measure all variants, kinds of levels and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings.
        variants: compared trainings by name.
        points: numbers of steps after which samples are drawn.

    Yields:
        The lines that are appended to the file.
    """
    cells = [
        (name, levels, seed)
        for seed in seeds
        for name in variants
        for levels in ("independent", "stratified")
    ]

    def measure_cell(name: str, levels: TimeSampling, seed: int) -> list[dict[str, Any]]:
        return [{"distances": measure(variants[name], levels, seed, points)}]

    return continue_study(out, ("arm", "levels", "seed"), cells, measure_cell)


def format_table(measurements: list[dict[str, Any]], scans: int) -> str:
    """Format the distances to one set of scans: mean over seeds, and half the range.

    Args:
        measurements: content of the study's file.
        scans: 0 for the training scans, 1 for the held-out scans.

    Returns:
        The table as Markdown.
    """
    points = sorted({int(point) for row in measurements for point in row["distances"]})
    rows = []
    for name, levels in dict.fromkeys((row["arm"], row["levels"]) for row in measurements):
        seeds = _distances(measurements, name, levels)
        cells = [[found[str(point)][scans] for found in seeds] for point in points]
        rows.append([name, levels, *(mean_and_half_range(cell, 1) for cell in cells)])
    return markdown_table(["arm", "levels", *(f"{point} steps" for point in points)], rows)


def draw(measurements: list[dict[str, Any]], out: Path) -> None:
    """Draw the mean distance to the held-out scans against steps, in one panel for each variant.

    Independent levels are dashed; the curves of all other variants are grey.

    Args:
        measurements: content of the study's file.
        out: image to write.
    """
    names = list(dict.fromkeys(row["arm"] for row in measurements))
    from matplotlib import rcParams

    figure, axes = create_figure(4, -(-len(names) // 4), width=3, height=2.6)
    ink, faint = rcParams["text.color"], rcParams["grid.color"]
    for axis, name in zip(axes, names, strict=False):
        for other in sorted(names, key=lambda each: each == name):
            for levels, style in (("stratified", "-"), ("independent", "--")):
                curve = _mean_distances(measurements, other, levels)
                look = {"color": ink, "lw": 2} if other == name else {"color": faint, "lw": 1}
                label = levels if other == name == names[0] else None
                axis.plot(list(curve), list(curve.values()), style, label=label, **look)
        axis.set(title=name, xscale="log", yscale="log", xlabel="steps", ylim=(90, 250))
        points = [point for point in POINTS if point in curve] or list(curve)
        axis.set_xticks(points, map(str, points))
        axis.set_yticks((100, 150, 200), ("100", "150", "200"))
        axis.minorticks_off()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[::4]:
        axis.set_ylabel("Fréchet distance")
    save_figure(figure, out)


def _mean_distances(measurements: list[dict[str, Any]], name: str, levels: str) -> dict[int, float]:
    """The mean distance to the held-out scans over seeds, by the number of steps."""
    seeds = _distances(measurements, name, levels)
    points = sorted(map(int, seeds[0])) if seeds else []
    return {point: mean(found[str(point)][1] for found in seeds) for point in points}


def _distances(
    measurements: list[dict[str, Any]], name: str, levels: str
) -> list[dict[str, list[float]]]:
    """The distances of a variant by the number of steps, for each seed."""
    return [
        row["distances"] for row in measurements if (row["arm"], row["levels"]) == (name, levels)
    ]
