"""The one loop, and `sample`: from seeds to samples.

state = sampler.start(x, knots, noise)
while not state.done:
state = sampler.advance(state, guided prediction at (state.x, state.level), noise)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcore.denoiser import Denoise, null_condition
from diffcore.guidance import CFG, Guidance
from diffcore.noise import Noise
from diffcore.prediction import Prediction
from diffcore.process import Process
from diffcore.samplers import DDIM, Sampler, State
from diffcore.schedules import Grid, Level, Trailing

Callback = Callable[[int, State, Prediction], bool | None]
"""Called after each prediction, before the step that uses it, with the number of knots left behind, the state (x and the level
asked about) and the prediction. True stops the run there: its result is state.x, which is at state.level, and the x_0 of the
prediction is the callback's to keep."""


class Samples(NamedTuple):
    """What `sample` made.

    Args:
        x: (N, *shape) on the host, a row a seed.
        knots: the levels visited.
        evaluations: network evaluations for each sample.
    """

    x: Tensor
    knots: tuple[Level, ...]
    evaluations: int


def sample(
    denoiser: Denoise,
    sampler: Sampler = DDIM(),
    grid: Grid = Trailing(),
    steps: int = 25,
    *,
    seeds: Sequence[int],
    condition: Sequence[int] | Tensor | None = None,
    guidance: Guidance = CFG(1.0),
    image: Tensor | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    callback: Callback | None = None,
) -> Samples:
    """One sample a seed, each a function of its own seed and condition alone.

    The network is always asked about `batch_size` rows (twice that with a reference), the last chunk padded: equal sizes
    give equal bits, whichever samples are beside it; another size agrees to rounding.

    Args:
        denoiser: a network with its process, or an oracle.
        sampler: the integrator.
        grid: which levels it visits.
        steps: how many steps it takes.
        seeds: one integer of 64 bits a sample.
        condition: one class label a sample (the null label is no condition); without it the samples are unconditional.
        guidance: how the condition is strengthened; CFG(1) is the conditional model.
        image: x_0 to start from (image-to-image), (N, *shape) or one for all. The first x is α x_0 + σ z at the first knot, so
            the grid says how much of the image is kept: Within(grid, low=λ of that noise).
        batch_size: rows of a network call.
        dtype: of the samples while they are integrated.
        progress: whether to show a bar.
        callback: sees each step of each chunk of `batch_size` rows, and can stop that chunk.

    Raises:
        ValueError: before the first step, where this process cannot be sampled so; the message has the remedy.
    """
    process = denoiser.process
    knots = grid.knots(process.schedule, steps)
    labels = check(process, knots, seeds, condition, guidance, batch_size)
    image = None if image is None else _images(process, knots[0], len(seeds), image)
    device = getattr(denoiser, "device", torch.device("cpu"))
    chunks, evaluations = [], 0
    bar = tqdm(total=len(seeds), unit="sample", disable=not progress)
    with torch.no_grad(), evaluating(denoiser), bar:
        for rows in _chunks(len(seeds), batch_size):
            noise = Noise(torch.tensor(seeds)[rows], process.shape, device, dtype)
            x = (
                noise.first_sample(knots[0], process.sigma_data)
                if image is None
                else noised(image[rows], knots[0], noise)
            )
            chosen = None if labels is None else labels[rows].to(device)
            x, evaluations = run(denoiser, sampler, x, knots, noise, guidance, chosen, callback)
            chunks.append(x.cpu())
            bar.update(min(batch_size, len(seeds) - bar.n))
    return Samples(torch.cat(chunks)[: len(seeds)], knots, evaluations)


def run(
    denoiser: Denoise,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance = CFG(1.0),
    condition: Tensor | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, int]:
    """The loop: x at the first knot to x at the last, and the network evaluations it took for each sample."""
    check_levels(denoiser.process, knots)
    if guidance.uses_reference:
        check_reference(denoiser.process, condition, guidance)
    state, memory, evaluations = sampler.start(x, knots, noise), None, 0
    while not state.done:
        prediction, memory, asked = guided(denoiser, guidance, state.x, state.level, condition, memory)
        evaluations += asked
        if callback is not None and callback(state.step, state, prediction):
            break
        state = sampler.advance(state, prediction, noise)
    return state.x, evaluations


def noised(image: Tensor, level: Level, noise: Noise) -> Tensor:
    """α x_0 + σ z at a level, z the noise that a run starts from: σ of it exactly, whatever the sampler."""
    z = noise.start()
    return level.alpha * image.to(z) + level.sigma * z


def guided(
    denoiser: Denoise, guidance: Guidance, x: Tensor, level: Level, condition: Tensor | None, memory: Any
) -> tuple[Prediction, Any, int]:
    """The guided prediction, the rule's memory after it, and the evaluations it cost: 2 in one batched forward, or 1."""
    if not guidance.needs_reference(level, memory):
        return denoiser(x, level, condition), memory, 1
    reference = null_condition(denoiser.process, len(x), x.device)
    assert condition is not None  # `run` refuses what has no condition or no reference
    assert reference is not None
    both = denoiser(torch.cat((x, x)), level, torch.cat((condition, reference)))
    (x0, x0_reference), (eps, eps_reference) = (value.chunk(2) for value in both)
    conditional, unconditional = Prediction(x0, eps), Prediction(x0_reference, eps_reference)
    return *guidance.combine(conditional, unconditional, x, level, memory), 2


def check(
    process: Process,
    knots: tuple[Level, ...],
    seeds: Sequence[int],
    condition: Sequence[int] | Tensor | None,
    guidance: Guidance,
    batch_size: int,
) -> Tensor | None:
    """The labels (N,), once everything that could be refused has been."""
    check_levels(process, knots)
    if not len(seeds):
        raise ValueError("seeds is empty, expected one integer a sample")
    long = [seed for seed in seeds if not -(2**63) <= seed < 2**63]
    if long:
        raise ValueError(f"seeds has {long[0]}, which is beyond 64 bits: expected integers within [-2^63, 2^63)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if guidance.uses_reference:
        check_reference(process, condition, guidance)
    return _labels(process, len(seeds), condition)


def check_levels(process: Process, knots: tuple[Level, ...]) -> None:
    """Raise where a network of this process cannot be asked at a knot; the last one is reached and not asked about."""
    for place, knot in enumerate(knots[:-1]):
        process.check_level(knot, f"knot {place}" if place else "the first knot")
    if not math.isfinite(knots[-1].sigma):
        raise ValueError("the last knot is pure noise (λ = -inf), where the ve scaling has σ = inf: end at a finite λ")


def check_reference(process: Process, condition: Sequence[int] | Tensor | None, guidance: Guidance) -> None:
    if condition is None:
        raise ValueError(
            f"{guidance} needs a condition to strengthen: pass one label a sample (--labels), or use CFG(1.0)"
        )
    if not process.dropout:
        raise ValueError(
            f"{guidance} needs the unconditional prediction, but this network was trained without condition dropout: "
            f"use CFG(1.0), or train with dropout above 0 (0.1 is usual)"
        )


def _labels(process: Process, count: int, condition: Sequence[int] | Tensor | None) -> Tensor | None:
    if condition is None:
        return null_condition(process, count)
    labels = torch.as_tensor(condition)
    if not process.classes:
        raise ValueError("condition was given, but this network has no classes: leave it out")
    if labels.shape != (count,):
        raise ValueError(f"condition has shape {tuple(labels.shape)}, expected one label for each of {count} seeds")
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
def evaluating(denoiser: Denoise) -> Iterator[None]:
    """Without the network's dropout; a network that evaluates already is not touched, so threads can share it."""
    training = isinstance(denoiser, nn.Module) and denoiser.training
    if not training:
        yield
        return
    assert isinstance(denoiser, nn.Module)
    modes = [(module, module.training) for module in denoiser.modules()]
    denoiser.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
