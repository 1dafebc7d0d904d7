"""The one loop: whatever the sampler and the guidance, and every number of evaluations.

state = sampler.start(x, knots, noise)
while not state.done:
state = sampler.advance(state, guided prediction at (state.x, state.level), noise)

Where guidance changes its mode the flow has a corner: from there the sampler goes on without its past.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, GuidanceInput, Step, evaluate_queries
from diffcore.guidance.reference import Condition, Query
from diffcore.samplers import Sampler, State
from diffcore.schedules import Level

Callback = Callable[[int, State, Prediction], bool | None]
"""Called after each prediction, before the step that uses it, with the number of knots left behind, the state (x and the level
asked about) and the prediction. True stops the run there: its result is state.x, which is at state.level, and the x_0 of the
prediction is the callback's to keep."""


SAME = 1e-9
"""In λ: a level nearer than this to a knot is that knot."""


def integrate(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance = CFG(1.0),
    condition: Tensor | None = None,
    rows: int = 0,
    callback: Callback | None = None,
) -> tuple[Tensor, int]:
    """The loop: x at the first knot to x at the last, and the network evaluations it took for each sample."""
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, sampler)
    bends = corners(knots, guidance.levels(denoiser.process))
    state, step, memory, evaluations = sampler.start(x, knots, noise), None, None, 0
    while not state.done:
        rule = guidance if sampler.uses_guidance(state) else CFG(1.0)
        step = step_of(denoiser.process, knots, state, step)
        prediction, memory, asked = guided_prediction(
            denoiser, rule, state.x, state.level, condition, memory, step, rows
        )
        evaluations += asked
        if callback is not None and callback(state.step, state, prediction):
            break
        state = settled(sampler, sampler.advance(state, prediction, noise), bends)
    return state.x, evaluations


def watch(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance,
    condition: Tensor | None = None,
) -> Iterator[GuidanceInput]:
    """What the guidance sees at each evaluation of a run: to fit LinearAG, or a threshold of AdaptiveGuidance.

    Where the sampler wants no guidance (see `Sampler.guided`), that is no reference.
    """
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, sampler)
    bends = corners(knots, guidance.levels(denoiser.process))
    state, step, memory = sampler.start(x, knots, noise), None, None
    while not state.done:
        with torch.no_grad():
            rule = guidance if sampler.uses_guidance(state) else CFG(1.0)
            step = step_of(denoiser.process, knots, state, step)
            seen = evaluate_references(denoiser, rule, state.x, condition, memory, step)
            prediction, memory = rule.combine(seen, memory)
            state = settled(sampler, sampler.advance(state, prediction, noise), bends)
        yield seen


def corners(knots: tuple[Level, ...], logsnrs: Sequence[float]) -> frozenset[float]:
    """λ of the knots at which guidance changes its mode."""
    return frozenset(
        float(knot.logsnr)
        for knot in knots
        for logsnr in logsnrs
        if abs(float(knot.logsnr) - logsnr) <= SAME
    )


def settled(sampler: Sampler, state: State, corners: frozenset[float]) -> State:
    """The state, without its past if it stands at a corner, between two steps (Heun asks about a step's end within it)."""
    if (
        not corners
        or state.done
        or state.level is state.remaining[0]
        or float(state.level.logsnr) not in corners
    ):
        return state
    return sampler.forget(state)


def guided_prediction(
    denoiser: DenoiserProtocol,
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
    seen = evaluate_references(
        denoiser,
        guidance,
        x,
        condition,
        memory,
        step or Step(denoiser.process, level, level, level),
        rows,
    )
    return *guidance.combine(seen, memory), 1 + len(seen.references)


def evaluate_references(
    denoiser: DenoiserProtocol,
    guidance: Guidance,
    x: Tensor,
    condition: Tensor | None,
    memory: Any,
    step: Step,
    rows: int = 0,
) -> GuidanceInput:
    """What the guidance is to see: the conditional prediction, and those references that it asks for."""
    references = guidance.required_references(step, memory)
    told = condition if denoiser.process.classes else None  # labels may be for the rule alone
    queries = [
        Query(denoiser, told),
        *(reference.query(denoiser, told, x) for reference in references),
    ]
    conditional, *others = evaluate_queries(queries, x, step.level, rows)
    return GuidanceInput(x, step, conditional, tuple(others), condition)


def step_of(
    process: Process, knots: tuple[Level, ...], state: State, before: Step | None = None
) -> Step:
    """The step that a state is in: every level that it asks about until the next knot belongs to it.

    Args:
        process: of the network.
        knots: of the run.
        state: what is asked about next.
        before: the step of the evaluation before this one.
    """
    same = before is not None and before.index == state.step
    start = before.start if before is not None and same else state.level
    return Step(process, state.level, start, state.remaining[0], state.step, len(knots) - 1)


def planned(
    process: Process, sampler: Sampler, knots: tuple[Level, ...], guidance: Guidance
) -> int | None:
    """The network evaluations for each sample, where no rule stops early; None where the sampler decides from what it sees.

    Counted by a run of no samples: samplers ask by the knots alone.
    """
    if sampler.is_adaptive:
        return None
    step, total = None, 0
    for state in sampler.dry_run(knots):
        step = step_of(process, knots, state, step)
        total += 1 + (
            len(guidance.required_references(step, None)) if sampler.uses_guidance(state) else 0
        )
    return total


def _steps(process: Process, knots: tuple[Level, ...]) -> Iterator[Step]:
    for i, (start, end) in enumerate(pairwise(knots)):
        yield Step(process, start, start, end, i, len(knots) - 1)


def check_levels(process: Process, knots: tuple[Level, ...]) -> None:
    """Raise where a network of this process cannot be asked at a knot; the last one is reached and not asked about."""
    for place, knot in enumerate(knots[:-1]):
        process.check_level(knot, f"knot {place}" if place else "the first knot")
    if knots[-1].schedule.scaling == "ve" and knots[-1].logsnr_range[0] == -math.inf:
        raise ValueError(
            "the last knot is pure noise (λ = -inf), where the ve scaling has σ = inf: end at a finite λ"
        )


def check_guidance(
    process: Process,
    knots: tuple[Level, ...],
    condition: Condition,
    guidance: Guidance,
    sampler: Sampler | None,
) -> None:
    """Raise where the guidance needs what there is not: a reference at some step, a condition, another sampler."""
    asked = [
        (reference, step.level)
        for step in _steps(process, knots)
        for reference in guidance.required_references(step, None)
    ]
    for reference in dict.fromkeys(reference for reference, _ in asked):
        reference.check(process, condition, str(guidance))
    for reference, level in asked:
        reference.check_level(level)
    guidance.check(process, condition)
    if sampler is None:
        return
    if not guidance.is_consistent and not sampler.is_direct:
        raise ValueError(
            f"{guidance} breaks x = α x_0 + σ ε, which {sampler} relies on: use a sampler of first-order steps such as DDIM(), "
            f"or CFG"
        )
    if guidance.requires_one_evaluation_per_step and (
        sampler.is_adaptive or sampler.evaluations(knots) != len(knots) - 1
    ):
        raise ValueError(
            f"{guidance} counts on one evaluation a step: use a sampler such as DDIM(), not {sampler}"
        )
