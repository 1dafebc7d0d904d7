"""Errors of images that are inverted and sampled again, or replayed from edit-friendly noise maps.

error = |x_0' - x_0| / |x_0|, where DDIM samples x_0' over the same knots from the result of
`invert`
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.accuracy import plane
from benchmarks.table import markdown_table
from torch import Tensor

from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.editing.inversion import invert
from diffcore.editing.noise_maps import extract, replay
from diffcore.samplers import DDIM
from diffcore.sampling.loop import integrate
from diffcore.schedules import Grid, Trailing
from diffcore.training.data import Digits
from experiments.study import train_averaged
from experiments.training import VARIANTS, digits_trainer

STEPS = (20, 50, 200)
ITERATIONS = (1, 2, 5, 10)


@dataclass(frozen=True)
class RoundTrip:
    """The result of inversions followed by sampling.

    Args:
        steps: number of DDIM steps in each direction.
        iterations: network evaluations of each inversion step.
        median: median error over the images.
        worst: largest error over the images.
        residual: largest residual of the inversion over all steps and images.
    """

    steps: int
    iterations: int
    median: float
    worst: float
    residual: float


def measure_round_trip(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    labels: Tensor | None,
    steps: int,
    iterations: int,
    grid: Grid = Trailing(),
) -> RoundTrip:
    """Invert images and sample again, without guidance.

    Args:
        denoiser: network or oracle.
        x0: (N, *shape) images.
        labels: (N,) labels, or None.
        steps: number of steps in each direction.
        iterations: network evaluations of each inversion step.
        grid: rule that places the knots.

    Returns:
        The errors.
    """
    knots = grid.knots(denoiser.process.schedule, steps)
    inversion = invert(denoiser, x0, knots, iterations, condition=labels)
    with torch.no_grad():
        again, _ = integrate(denoiser, DDIM(), inversion.x, knots, _noise(x0), condition=labels)
    error = (again - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
    residual = inversion.residual.max().item()
    return RoundTrip(steps, iterations, error.median().item(), error.max().item(), residual)


def measure_round_trips(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    labels: Tensor | None = None,
    steps: Sequence[int] = STEPS,
    iterations: Sequence[int] = ITERATIONS,
) -> Iterator[RoundTrip]:
    """Measure all combinations of steps and iterations.

    Args:
        denoiser: network or oracle.
        x0: (N, *shape) images.
        labels: (N,) labels, or None.
        steps: numbers of steps.
        iterations: numbers of evaluations of each inversion step.

    Yields:
        The errors of each combination.
    """
    for n in steps:
        for count in iterations:
            yield measure_round_trip(denoiser, x0, labels, n, count)


def measure_replay(
    denoiser: DenoiserProtocol, x0: Tensor, labels: Tensor | None, steps: int
) -> float:
    """Measure the error of noise maps (η = 1) that are extracted and replayed.

    Args:
        denoiser: network or oracle.
        x0: (N, *shape) images.
        labels: (N,) labels, or None.
        steps: number of steps.

    Returns:
        The largest absolute difference of an element.
    """
    knots = Trailing().knots(denoiser.process.schedule, steps)
    maps = extract(denoiser, x0, knots, _noise(x0), condition=labels)
    return (replay(denoiser, maps, condition=labels) - x0).abs().max().item()


def format_table(trips: Sequence[RoundTrip]) -> str:
    """Format median and worst error for each number of steps and iterations.

    Args:
        trips: errors of all combinations.

    Returns:
        The table as Markdown.
    """
    iterations = sorted({trip.iterations for trip in trips})
    rows = []
    for steps in sorted({trip.steps for trip in trips}):
        row = {trip.iterations: trip for trip in trips if trip.steps == steps}
        cells = [f"{row[n].median:.2g} (worst {row[n].worst:.2g})" for n in iterations]
        rows.append([str(steps), *cells])
    header = [f"{n} iteration{'s' if n > 1 else ''}" for n in iterations]
    return markdown_table(["steps", *header], rows)


def train_denoiser(steps: int = 400) -> Denoiser:
    """Train the study's network on the digits.

    Args:
        steps: optimizer steps of batch 64.

    Returns:
        The network with averaged weights.
    """
    with TemporaryDirectory() as folder:
        variant = VARIANTS["cosine, v, Min-SNR"]
        return train_averaged(digits_trainer(variant, "stratified", 0, Path(folder), steps))


def format_report(denoiser: Denoiser, images: int = 32) -> str:
    """Measure and format the tables of docs/experiments/inversion.md.

    Args:
        denoiser: trained network.
        images: number of images of each measurement.

    Returns:
        The tables as Markdown.
    """
    test, oracle = Digits("test"), plane()
    x0, labels = test.x0[:images], test.labels[:images]
    points = oracle.sample(torch.arange(images))
    network_table = format_table(list(measure_round_trips(denoiser, x0, labels)))
    oracle_table = format_table(list(measure_round_trips(oracle, points)))
    replays = [f"{measure_replay(denoiser, x0, labels, n):.1e} ({n} steps)" for n in STEPS]
    return (
        f"Trained network, {images} held-out scans under their own labels\n\n{network_table}\n\n"
        f"Oracle, mixture in 2-D, {images} samples\n\n{oracle_table}\n\n"
        "Noise maps replayed on the trained network, largest difference of a pixel: "
        f"{', '.join(replays)}"
    )


def _noise(x: Tensor) -> Noise:
    return Noise(torch.arange(len(x)), tuple(x.shape[1:]), dtype=x.dtype)
