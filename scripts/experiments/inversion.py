"""How well an image comes back from its inversion, and from its edit-friendly noise maps: on a trained network and an oracle.

error = |x_0' - x_0| / |x_0| of each image, x_0' sampled by DDIM over the same knots from what `invert` found
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.accuracy import plane
from torch import Tensor

from diffcore.core.denoiser import Denoise, Denoiser
from diffcore.core.noise import Noise
from diffcore.editing.inversion import invert
from diffcore.editing.noise_maps import extract, replay
from diffcore.samplers import DDIM
from diffcore.sampling.loop import integrate
from diffcore.schedules import Grid, Trailing
from diffcore.training.data import Digits
from experiments.training import ARMS, averaged, trainer

STEPS = (20, 50, 200)
ITERATIONS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Trip:
    """There and back.

    Args:
        steps: of DDIM.
        iterations: evaluations of each step of the inversion.
        median: error, over the images.
        worst: error.
        residual: the largest of any step and image.
    """

    steps: int
    iterations: int
    median: float
    worst: float
    residual: float


def trip(
    denoiser: Denoise,
    x0: Tensor,
    labels: Tensor | None,
    steps: int,
    iterations: int,
    grid: Grid = Trailing(),
) -> Trip:
    """Invert and sample again, without guidance."""
    knots = grid.knots(denoiser.process.schedule, steps)
    found = invert(denoiser, x0, knots, iterations, condition=labels)
    again = _sampled(denoiser, found.x, steps, labels, grid)
    error = (again - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
    return Trip(
        steps, iterations, error.median().item(), error.max().item(), found.residual.max().item()
    )


def trips(
    denoiser: Denoise,
    x0: Tensor,
    labels: Tensor | None = None,
    steps: Sequence[int] = STEPS,
    iterations: Sequence[int] = ITERATIONS,
) -> Iterator[Trip]:
    """All combinations."""
    for n in steps:
        for count in iterations:
            yield trip(denoiser, x0, labels, n, count)


def replayed(denoiser: Denoise, x0: Tensor, labels: Tensor | None, steps: int) -> float:
    """The largest difference of an element after `extract` and `replay` of noise maps, η = 1."""
    knots = Trailing().knots(denoiser.process.schedule, steps)
    maps = extract(denoiser, x0, knots, _noise(x0), condition=labels)
    return (replay(denoiser, maps, condition=labels) - x0).abs().max().item()


def table(found: Sequence[Trip]) -> str:
    """Median and worst error by steps and iterations, as Markdown."""
    iterations = sorted({trip.iterations for trip in found})
    head = " | ".join(f"{n} iteration{'s' if n > 1 else ''}" for n in iterations)
    lines = [f"| steps | {head} |", "|---|" + "---|" * len(iterations)]
    for steps in sorted({trip.steps for trip in found}):
        row = {trip.iterations: trip for trip in found if trip.steps == steps}
        cells = " | ".join(f"{row[n].median:.2g} (worst {row[n].worst:.2g})" for n in iterations)
        lines.append(f"| {steps} | {cells} |")
    return "\n".join(lines)


def trained(steps: int = 400) -> Denoiser:
    """The study's network after so many steps of batch 64 on the digits, its weights averaged."""
    with TemporaryDirectory() as folder:
        return averaged(trainer(ARMS["cosine, v, Min-SNR"], "stratified", 0, Path(folder), steps))


def report(denoiser: Denoiser, images: int = 32) -> str:
    """The tables of docs/experiments/inversion.md."""
    test, oracle = Digits("test"), plane()
    x0, labels = test.x0[:images], test.labels[:images]
    points = oracle.sample(torch.arange(images))
    maps = ", ".join(f"{replayed(denoiser, x0, labels, n):.1e} ({n} steps)" for n in STEPS)
    return (
        f"Trained network, {images} held-out scans under their own labels\n\n{table(list(trips(denoiser, x0, labels)))}\n\n"
        f"Oracle, mixture in 2-D, {images} samples\n\n{table(list(trips(oracle, points)))}\n\n"
        f"Noise maps replayed on the trained network, largest difference of a pixel: {maps}"
    )


@torch.no_grad()
def _sampled(denoiser: Denoise, x: Tensor, steps: int, labels: Tensor | None, grid: Grid) -> Tensor:
    knots = grid.knots(denoiser.process.schedule, steps)
    return integrate(denoiser, DDIM(), x, knots, _noise(x), condition=labels)[0]


def _noise(x: Tensor) -> Noise:
    return Noise(torch.arange(len(x)), tuple(x.shape[1:]), dtype=x.dtype)
