"""From seeds to samples: which knots, what is drawn, what is refused before the first step, and how the batch is cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcore.core.denoiser import DenoiserProtocol, null_condition
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, find_weaker_networks
from diffcore.guidance.reference import Condition
from diffcore.samplers import AdamsMoulton, Sampler
from diffcore.sampling.loop import SAME, Callback, check_guidance, check_levels, integrate, planned
from diffcore.schedules import Grid, Level, UniformBlend

SAMPLER: Sampler = AdamsMoulton(3, every=10)
"""The default, with GRID: chosen by distance to the exact flow's end for equal evaluations (docs/benchmarks.md)."""

GRID: Grid = UniformBlend(1.25, 0.5)
"""The default: knots from pure noise to clean, densest in λ where the noise is half of the data."""


class Samples(NamedTuple):
    """What `sample` made.

    Args:
        x: (N, *shape) on the host, a row a seed.
        knots: the levels visited, those that the guidance adds included.
        evaluations: network evaluations for each sample, on average where a rule decided from what it saw.
        planned: those known beforehand, of all references that no rule saw reason to leave out; None where the sampler decides.
    """

    x: Tensor
    knots: tuple[Level, ...]
    evaluations: float
    planned: int | None


def sample(
    denoiser: DenoiserProtocol,
    sampler: Sampler = SAMPLER,
    grid: Grid = GRID,
    steps: int = 25,
    *,
    seeds: Sequence[int],
    condition: Condition = None,
    guidance: Guidance = CFG(1.0),
    image: Tensor | None = None,
    batch_size: int = 64,
    rows: int = 0,
    dtype: torch.dtype = torch.float32,
    path: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Samples:
    """One sample a seed, each a function of its own seed and condition alone.

    The network is always asked about `batch_size` rows (and as many for each of its references, in one forward), the last
    chunk padded: equal sizes give equal bits, whichever samples are beside it; another size agrees to rounding.

    Args:
        denoiser: a network with its process, or an oracle.
        sampler: the integrator.
        grid: which levels it visits.
        steps: how many steps it takes.
        seeds: one integer of 64 bits a sample.
        condition: one class label a sample (the null label is no condition); without it the samples are unconditional.
        guidance: how the condition is strengthened; CFG(1) is the conditional model. Levels where it changes its mode
            become knots.
        image: x_0 to start from (image-to-image), (N, *shape) or one for all. The first x is α x_0 + σ z at the first knot, so
            the grid says how much of the image is kept: Within(grid, low=λ of that noise).
        batch_size: samples that are integrated together.
        rows: of one forward, where `batch_size` and its references are too many; 0 asks about all of them at once.
        dtype: of the samples while they are integrated.
        path: whether the noise of a stochastic sampler's steps is the increments of one path (see Noise), so that the same seed
            with more steps gives a nearby sample.
        progress: whether to show a bar.
        callback: sees each step of each chunk of `batch_size` rows, and can stop that chunk.

    Raises:
        ValueError: before the first step, where this process cannot be sampled so; the message has the remedy.
    """
    process = denoiser.process
    knots = with_levels(grid.knots(process.schedule, steps), guidance.levels(process))
    labels = check(process, knots, seeds, condition, guidance, batch_size, sampler)
    if rows < 0:
        raise ValueError(f"rows is {rows}, expected the rows of one forward, or 0 for all at once")
    image = None if image is None else _images(process, knots[0], len(seeds), image)
    device = denoiser.device
    chunks, evaluations = [], 0
    bar = tqdm(total=len(seeds), unit="sample", disable=not progress)
    with torch.no_grad(), evaluating(denoiser, *find_weaker_networks(guidance)), bar:
        for chunk in _chunks(len(seeds), batch_size):
            noise = Noise(torch.tensor(seeds)[chunk], process.shape, device, dtype, path)
            first = knots[0]
            x = (
                noise.first_sample(first, process.sigma_data)
                if image is None
                else noised(image[chunk], first, noise)
            )
            chosen = None if labels is None else labels[chunk].to(device)
            x, asked = integrate(
                denoiser, sampler, x, knots, noise, guidance, chosen, rows, callback
            )
            chunks.append(x.cpu())
            real = min(batch_size, len(seeds) - int(chunk[0]))
            evaluations += asked * real
            bar.update(real)
    return Samples(
        torch.cat(chunks)[: len(seeds)],
        knots,
        evaluations / len(seeds),
        planned(process, sampler, knots, guidance),
    )


def noised(image: Tensor, level: Level, noise: Noise) -> Tensor:
    """α x_0 + σ z at a level, z the noise that a run starts from: σ of it exactly, whatever the sampler."""
    z = noise.start()
    return level.alpha * image.to(z) + level.sigma * z


def with_levels(knots: tuple[Level, ...], logsnrs: Sequence[float]) -> tuple[Level, ...]:
    """The knots, and between them those levels that are not there yet."""
    found = {float(knot.logsnr): knot for knot in knots}
    for logsnr in logsnrs:
        if min(found) < logsnr < max(found) and all(abs(known - logsnr) > SAME for known in found):
            found[logsnr] = knots[0].schedule.at(logsnr)
    return tuple(
        found[logsnr] for logsnr in sorted(found, reverse=bool(knots[0].logsnr > knots[-1].logsnr))
    )


def check(
    process: Process,
    knots: tuple[Level, ...],
    seeds: Sequence[int],
    condition: Condition,
    guidance: Guidance,
    batch_size: int,
    sampler: Sampler | None = None,
) -> Tensor | None:
    """The labels (N,), once everything that could be refused has been."""
    check_levels(process, knots)
    if not len(seeds):
        raise ValueError("seeds is empty, expected one integer a sample")
    long = [seed for seed in seeds if not -(2**63) <= seed < 2**63]
    if long:
        raise ValueError(
            f"seeds has {long[0]}, which is beyond 64 bits: expected integers within [-2^63, 2^63)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    check_guidance(process, knots, condition, guidance, sampler)
    return _labels(process, len(seeds), condition, guidance.reads_condition)


def _labels(process: Process, count: int, condition: Condition, read: bool) -> Tensor | None:
    if condition is None:
        return null_condition(process, count)
    labels = torch.as_tensor(condition)
    if not process.classes and not read:
        raise ValueError("condition was given, but this network has no classes: leave it out")
    if labels.shape != (count,):
        raise ValueError(
            f"condition has shape {tuple(labels.shape)}, expected one label for each of {count} seeds"
        )
    if not process.classes:
        return labels  # of the classifier
    wrong = labels[(labels < 0) | (labels > process.classes)].tolist()
    if wrong:
        raise ValueError(
            f"labels {sorted(set(wrong))} are out of range, expected 0 .. {process.classes - 1} "
            f"({process.classes} is no condition)"
        )
    return labels


def _images(process: Process, first: Level, count: int, image: Tensor) -> Tensor:
    if image.shape not in (process.shape, (1, *process.shape), (count, *process.shape)):
        raise ValueError(
            f"image has shape {tuple(image.shape)}, expected {process.shape}, or one of these for each of {count} seeds"
        )
    if first.alpha == 0:
        raise ValueError(
            "the first knot is pure noise, which keeps nothing of the image: start at a finite level, Within(grid, low=λ)"
        )
    return image.expand(count, *process.shape)


def _chunks(count: int, size: int) -> Iterator[Tensor]:
    """Rows of each network call, always `size` of them: the last chunk repeats the last row."""
    for start in range(0, count, size):
        yield torch.arange(start, start + size).clamp(max=count - 1)


@contextmanager
def evaluating(*asked: object) -> Iterator[None]:
    """Without the networks' dropout; a network that evaluates already is not touched, so threads can share it."""
    training = [network for network in asked if isinstance(network, nn.Module) and network.training]
    modes = [(module, module.training) for network in training for module in network.modules()]
    for network in training:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
