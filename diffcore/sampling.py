"""The one loop, and `sample`: from seeds to samples.

state = sampler.start(x, knots, noise)
while not state.done:
state = sampler.advance(state, guided prediction at (state.x, state.level), noise)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcore.denoiser import Denoise, null_condition
from diffcore.guidance import CFG, Guidance, Seen, Step, answers
from diffcore.guidance.reference import Condition, Query
from diffcore.noise import Noise
from diffcore.prediction import Prediction
from diffcore.process import Process
from diffcore.samplers import DDIM, Sampler, State
from diffcore.schedules import Grid, Level, Trailing

SAME = 1e-9
"""In λ: a level nearer than this to a knot is that knot."""


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
    denoiser: Denoise,
    sampler: Sampler = DDIM(),
    grid: Grid = Trailing(),
    steps: int = 25,
    *,
    seeds: Sequence[int],
    condition: Condition = None,
    guidance: Guidance = CFG(1.0),
    batch_size: int = 64,
    rows: int = 0,
    dtype: torch.dtype = torch.float32,
    path: bool = False,
    progress: bool = False,
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
        batch_size: samples that are integrated together.
        rows: of one forward, where `batch_size` and its references are too many; 0 asks about all of them at once.
        dtype: of the samples while they are integrated.
        path: whether the noise of a stochastic sampler's steps is the increments of one path (see Noise), so that the same seed
            with more steps gives a nearby sample.
        progress: whether to show a bar.

    Raises:
        ValueError: before the first step, where this process cannot be sampled so; the message has the remedy.
    """
    process = denoiser.process
    knots = with_levels(grid.knots(process.schedule, steps), guidance.levels(process))
    labels = check(process, knots, seeds, condition, guidance, batch_size, sampler)
    if rows < 0:
        raise ValueError(f"rows is {rows}, expected the rows of one forward, or 0 for all at once")
    device = getattr(denoiser, "device", torch.device("cpu"))
    chunks, evaluations = [], 0
    bar = tqdm(total=len(seeds), unit="sample", disable=not progress)
    with torch.no_grad(), _evaluating(denoiser), bar:
        for chunk in _chunks(len(seeds), batch_size):
            noise = Noise(torch.tensor(seeds)[chunk], process.shape, device, dtype, path)
            x = noise.first_sample(knots[0], process.sigma_data)
            chosen = None if labels is None else labels[chunk].to(device)
            x, asked = run(denoiser, sampler, x, knots, noise, guidance, chosen, rows)
            chunks.append(x.cpu())
            real = min(batch_size, len(seeds) - int(chunk[0]))
            evaluations += asked * real
            bar.update(real)
    return Samples(
        torch.cat(chunks)[: len(seeds)], knots, evaluations / len(seeds), planned(process, sampler, knots, guidance)
    )


def run(
    denoiser: Denoise,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance = CFG(1.0),
    condition: Tensor | None = None,
    rows: int = 0,
) -> tuple[Tensor, int]:
    """The loop: x at the first knot to x at the last, and the network evaluations it took for each sample."""
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, sampler)
    state, step, memory, evaluations = sampler.start(x, knots, noise), None, None, 0
    while not state.done:
        rule = guidance if sampler.guided(state) else CFG(1.0)
        step = step_of(denoiser.process, knots, state, step)
        prediction, memory, asked = guided(denoiser, rule, state.x, state.level, condition, memory, step, rows)
        state = sampler.advance(state, prediction, noise)
        evaluations += asked
    return state.x, evaluations


def watch(
    denoiser: Denoise,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance,
    condition: Tensor | None = None,
) -> Iterator[Seen]:
    """What the guidance sees at each evaluation of a run: to fit LinearAG, or a threshold of AdaptiveGuidance."""
    check_guidance(denoiser.process, knots, condition, guidance, sampler)
    state, step, memory = sampler.start(x, knots, noise), None, None
    while not state.done:
        with torch.no_grad():
            step = step_of(denoiser.process, knots, state, step)
            seen = look(denoiser, guidance, state.x, condition, memory, step)
            prediction, memory = guidance.guide(seen, memory)
            state = sampler.advance(state, prediction, noise)
        yield seen


def guided(
    denoiser: Denoise,
    guidance: Guidance,
    x: Tensor,
    level: Level,
    condition: Tensor | None,
    memory: Any,
    step: Step | None = None,
    rows: int = 0,
) -> tuple[Prediction, Any, int]:
    """The guided prediction, the rule's memory after it, and the evaluations it cost: 1, and 1 for each reference.

    Without a step it is one from the level to itself.
    """
    seen = look(denoiser, guidance, x, condition, memory, step or Step(denoiser.process, level, level, level), rows)
    return *guidance.guide(seen, memory), 1 + len(seen.references)


def look(
    denoiser: Denoise,
    guidance: Guidance,
    x: Tensor,
    condition: Tensor | None,
    memory: Any,
    step: Step,
    rows: int = 0,
) -> Seen:
    """What the guidance is to see: the conditional prediction, and those references that it asks for."""
    references = guidance.asks(step, memory)
    told = condition if denoiser.process.classes else None  # labels may be for the rule alone
    queries = [Query(denoiser, told), *(reference.query(denoiser, told, x) for reference in references)]
    conditional, *others = answers(queries, x, step.level, rows)
    return Seen(x, step, conditional, tuple(others), condition)


def step_of(process: Process, knots: tuple[Level, ...], state: State, before: Step | None = None) -> Step:
    """The step that a state is in: every level that it asks about until the next knot belongs to it.

    Args:
        process: of the network.
        knots: of the run.
        state: what is asked about next.
        before: the step of the evaluation before this one.
    """
    same = before is not None and before.index == state.step
    start = before.start if before is not None and same else state.level
    return Step(process, state.level, start, state.left[0], state.step, len(knots) - 1)


def with_levels(knots: tuple[Level, ...], logsnrs: Sequence[float]) -> tuple[Level, ...]:
    """The knots, and between them those levels that are not there yet."""
    found = {float(knot.logsnr): knot for knot in knots}
    for logsnr in logsnrs:
        if min(found) < logsnr < max(found) and all(abs(known - logsnr) > SAME for known in found):
            found[logsnr] = knots[0].schedule.at(logsnr)
    return tuple(found[logsnr] for logsnr in sorted(found, reverse=bool(knots[0].logsnr > knots[-1].logsnr)))


def planned(process: Process, sampler: Sampler, knots: tuple[Level, ...], guidance: Guidance) -> int | None:
    """The network evaluations for each sample, where no rule stops early; None where the sampler decides from what it sees.

    Counted by a run of no samples: samplers ask by the knots alone.
    """
    if sampler.adaptive:
        return None
    noise = Noise(torch.zeros(0, dtype=torch.int64), process.shape)
    state, step, total = sampler.start(noise.start(), knots, noise), None, 0
    while not state.done:
        step = step_of(process, knots, state, step)
        total += 1 + (len(guidance.asks(step, None)) if sampler.guided(state) else 0)
        state = sampler.advance(state, Prediction(state.x, state.x), noise)
    return total


def _steps(process: Process, knots: tuple[Level, ...]) -> Iterator[Step]:
    for i, (start, end) in enumerate(pairwise(knots)):
        yield Step(process, start, start, end, i, len(knots) - 1)


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
        raise ValueError(f"seeds has {long[0]}, which is beyond 64 bits: expected integers within [-2^63, 2^63)")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    check_guidance(process, knots, condition, guidance, sampler)
    return _labels(process, len(seeds), condition, guidance.reads_condition)


def check_levels(process: Process, knots: tuple[Level, ...]) -> None:
    """Raise where a network of this process cannot be asked at a knot; the last one is reached and not asked about."""
    for place, knot in enumerate(knots[:-1]):
        process.check_level(knot, f"knot {place}" if place else "the first knot")
    if not math.isfinite(knots[-1].sigma):
        raise ValueError("the last knot is pure noise (λ = -inf), where the ve scaling has σ = inf: end at a finite λ")


def check_guidance(
    process: Process, knots: tuple[Level, ...], condition: Condition, guidance: Guidance, sampler: Sampler | None
) -> None:
    """Raise where the guidance needs what there is not: a reference at some step, a condition, another sampler."""
    references = dict.fromkeys(r for step in _steps(process, knots) for r in guidance.asks(step, None))
    for reference in references:
        reference.check(process, condition, str(guidance))
    guidance.check(process, condition)
    if sampler is None:
        return
    if not guidance.consistent and sampler.order > 1:
        raise ValueError(
            f"{guidance} breaks x = α x_0 + σ ε, which {sampler} of order {sampler.order} relies on: use a first-order "
            f"sampler such as DDIM(), or CFG"
        )
    if guidance.once_a_step and (sampler.adaptive or sampler.evaluations(knots) != len(knots) - 1):
        raise ValueError(f"{guidance} counts on one evaluation a step: use a sampler such as DDIM(), not {sampler}")


def _labels(process: Process, count: int, condition: Condition, read: bool) -> Tensor | None:
    if condition is None:
        return null_condition(process, count)
    labels = torch.as_tensor(condition)
    if not process.classes and not read:
        raise ValueError("condition was given, but this network has no classes: leave it out")
    if labels.shape != (count,):
        raise ValueError(f"condition has shape {tuple(labels.shape)}, expected one label for each of {count} seeds")
    if not process.classes:
        return labels  # of the classifier
    wrong = labels[(labels < 0) | (labels > process.classes)].tolist()
    if wrong:
        raise ValueError(
            f"labels {sorted(set(wrong))} are out of range, expected 0 .. {process.classes - 1} "
            f"({process.classes} is no condition)"
        )
    return labels


def _chunks(count: int, size: int) -> Iterator[Tensor]:
    """Rows of each network call, always `size` of them: the last chunk repeats the last row."""
    for start in range(0, count, size):
        yield torch.arange(start, start + size).clamp(max=count - 1)


@contextmanager
def _evaluating(denoiser: Denoise) -> Iterator[None]:
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
