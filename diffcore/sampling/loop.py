"""The sampling loop for any sampler and guidance rule; it counts network evaluations.

    state = sampler.start(x, knots, noise)
    while not state.done:
        prediction = guided prediction at (state.x, state.level)
        state = sampler.advance(state, prediction, noise)

Where guidance changes its mode, the slope of the flow jumps: from there a multistep sampler
continues without its memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.caches.integration import integration, plan_levels
from diffcore.core.conditions import LABEL, BatchCondition, Conditions, labels_of
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.estimate import require_posterior_mean
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, GuidanceInput, Step, evaluate_queries, find_networks
from diffcore.guidance.evaluation import GuidingDenoiser, list_queries
from diffcore.guidance.reference import Condition
from diffcore.samplers import Sampler, State
from diffcore.samplers.consistency import check_estimate
from diffcore.sampling.mode_changes import find_mode_changes, forget_at_mode_change
from diffcore.schedules import Level

__all__ = [
    "Callback",
    "check_guidance",
    "check_levels",
    "count_evaluations",
    "current_step",
    "evaluate_references",
    "evaluation_mode",
    "guided_prediction",
    "integrate",
    "watch",
]

Callback = Callable[[int, State, Prediction], bool | None]
"""Called after each prediction, before the step that uses it.

It receives the number of knots passed, the state (x and the level of the evaluation) and the
prediction. True stops the loop, whose result then is state.x, at state.level.
"""


@integration()
def integrate(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance = CFG(1.0),
    condition: BatchCondition | None = None,
    micro_batch: int = 0,
    callback: Callback | None = None,
    *,
    checked: bool = False,
) -> tuple[Tensor, int]:
    """Integrate x from the first knot to the last.

    Args:
        denoiser: network with its process, or an exact denoiser.
        sampler: numerical integrator.
        x: (B, *shape) samples at the first knot.
        knots: levels between which the sampler steps.
        noise: noise of stochastic samplers, keyed by the seeds of the samples.
        guidance: guidance rule; CFG(1) is the conditional model.
        condition: (B,) labels or `Conditions`, or None.
        micro_batch: number of samples in each call of the network; 0: B and its references in one
            call.
        callback: receives each prediction, and can stop the loop.
        checked: true if `check_levels` and `check_guidance` have accepted the arguments, as
            `sample` does once for all of its chunks.

    Returns:
        x (B, *shape) at the last knot, and the number of network evaluations for each sample.

    Raises:
        ValueError: The process, the knots, the condition, the guidance and the sampler do not fit
            together.
    """
    if not checked:
        check_levels(denoiser.process, knots)
        check_guidance(denoiser.process, knots, condition, guidance, sampler)
    mode_changes = find_mode_changes(knots, guidance.levels(denoiser.process))
    plan_levels(lambda: None if sampler.is_adaptive else sampler.evaluation_levels(knots))
    state, step, memory, evaluations = sampler.start(x, knots, noise), None, None, 0
    while not state.done:
        rule = guidance if sampler.uses_guidance(state) else CFG(1.0)
        step = current_step(denoiser.process, sampler, knots, state, step)
        prediction, memory, count = guided_prediction(
            denoiser, rule, state.x, state.level, condition, memory, step, micro_batch
        )
        evaluations += count
        if callback is not None and callback(state.step, state, prediction):
            break
        state = sampler.advance(state, prediction, noise)
        state = forget_at_mode_change(sampler, state, mode_changes)
    return state.x, evaluations


def watch(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    x: Tensor,
    knots: tuple[Level, ...],
    noise: Noise,
    guidance: Guidance,
    condition: BatchCondition | None = None,
) -> Iterator[GuidanceInput]:
    """The input of the guidance rule at each evaluation, to fit LinearAG or a threshold of
    AdaptiveGuidance. Networks are in evaluation mode during each evaluation, as in `sample`.

    Args:
        denoiser: network with its process, or an exact denoiser.
        sampler: numerical integrator.
        x: (B, *shape) samples at the first knot.
        knots: levels between which the sampler steps.
        noise: noise of stochastic samplers.
        guidance: guidance rule.
        condition: (B,) labels or `Conditions`, or None.

    Returns:
        An iterator over the inputs; an input has no references where the sampler uses no guidance.

    Raises:
        ValueError: As `integrate`.
    """
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, sampler)
    mode_changes = find_mode_changes(knots, guidance.levels(denoiser.process))
    state, step, memory = sampler.start(x, knots, noise), None, None
    while not state.done:
        with torch.no_grad(), evaluation_mode(denoiser, *find_networks(guidance)):
            rule = guidance if sampler.uses_guidance(state) else CFG(1.0)
            step = current_step(denoiser.process, sampler, knots, state, step)
            inputs = evaluate_references(denoiser, rule, state.x, condition, memory, step)
            prediction, memory = rule.guide(inputs, memory)
            state = sampler.advance(state, prediction, noise)
            state = forget_at_mode_change(sampler, state, mode_changes)
        yield inputs


def guided_prediction(
    denoiser: DenoiserProtocol,
    guidance: Guidance,
    x: Tensor,
    level: Level,
    condition: BatchCondition | None,
    memory: Any,
    step: Step | None = None,
    micro_batch: int = 0,
) -> tuple[Prediction, Any, int]:
    """Evaluate the network and the references, and combine them.

    Args:
        denoiser: network with its process.
        guidance: guidance rule.
        x: (B, *shape) samples at `level`.
        level: level of the evaluation.
        condition: (B,) labels or `Conditions`, or None.
        memory: memory of the rule; None at the first evaluation.
        step: step of the evaluation; default: a step from `level` to itself.
        micro_batch: number of samples in each call of the network; 0 for one call.

    Returns:
        The guided prediction, the memory of the rule after it, and the number of network
        evaluations: 1, and 1 for each reference.
    """
    step = step or Step(denoiser.process, level, level, level)
    if isinstance(denoiser, GuidingDenoiser):
        return denoiser.guided_prediction(guidance, x, condition, memory, step, micro_batch)
    inputs = evaluate_references(denoiser, guidance, x, condition, memory, step, micro_batch)
    return *guidance.guide(inputs, memory), 1 + len(inputs.references)


def evaluate_references(
    denoiser: DenoiserProtocol,
    guidance: Guidance,
    x: Tensor,
    condition: BatchCondition | None,
    memory: Any,
    step: Step,
    micro_batch: int = 0,
) -> GuidanceInput:
    """Evaluate the conditional prediction and the references that the rule requires.

    Args:
        denoiser: network with its process.
        guidance: guidance rule.
        x: (B, *shape) samples at the level of the step.
        condition: (B,) labels or `Conditions`, or None.
        memory: memory of the rule.
        step: step of the evaluation.
        micro_batch: number of samples in each call of the network; 0 for one call.

    Returns:
        The input of the rule.
    """
    references = guidance.required_references(step, memory)
    queries = list_queries(denoiser, references, x, condition)
    conditional, *others = evaluate_queries(queries, x, step.level, micro_batch)
    return GuidanceInput(x, step, conditional, tuple(others), labels_of(condition))


def current_step(
    process: Process,
    sampler: Sampler,
    knots: tuple[Level, ...],
    state: State,
    before: Step | None = None,
) -> Step:
    """The step of a state. All evaluations until the next knot belong to it.

    Args:
        process: process of the network.
        sampler: numerical integrator.
        knots: levels between which the sampler steps.
        state: state before the evaluation.
        before: step of the previous evaluation, if any.

    Returns:
        The step, whose level has an end if the network receives two times.
    """
    is_same = before is not None and before.index == state.step
    start = before.start if before is not None and is_same else state.level
    level, end = state.level, state.remaining[0]
    if process.estimate == "mean_velocity":
        level = replace(level, end=sampler.end(state))
    return Step(process, level, start, end, state.step, len(knots) - 1)


def count_evaluations(
    process: Process, sampler: Sampler, knots: tuple[Level, ...], guidance: Guidance
) -> int | None:
    """The number of network evaluations for each sample, by a dry run on an empty batch.

    Args:
        process: process of the network.
        sampler: numerical integrator.
        knots: levels between which the sampler steps.
        guidance: guidance rule.

    Returns:
        The number if no rule stops early; None for an adaptive sampler.
    """
    if sampler.is_adaptive:
        return None
    step, total = None, 0
    for state in sampler.dry_run(knots):
        step = current_step(process, sampler, knots, state, step)
        total += 1 + (
            len(guidance.required_references(step, None)) if sampler.uses_guidance(state) else 0
        )
    return total


def _steps(process: Process, knots: tuple[Level, ...]) -> Iterator[Step]:
    for i, (start, end) in enumerate(pairwise(knots)):
        yield Step(process, start, start, end, i, len(knots) - 1)


def check_levels(process: Process, knots: tuple[Level, ...]) -> None:
    """Raise ValueError if a network of this process cannot be evaluated at a knot; at the last one
    it is not.
    """
    evaluated = knots[:-1]
    try:
        # The others are neither noisier nor cleaner than these; an end may be infinite.
        for knot in evaluated[:2] + evaluated[-2:]:
            process.check_level(knot)
    except ValueError:
        for index, knot in enumerate(evaluated):
            process.check_level(knot, f"knot {index}" if index else "the first knot")
    if knots[-1].schedule.scaling == "ve" and knots[-1].logsnr_range[0] == -math.inf:
        raise ValueError(
            "the last knot is pure noise (λ = -inf), where the ve scaling has σ = inf: end at a "
            "finite λ"
        )


def check_guidance(
    process: Process,
    knots: tuple[Level, ...],
    condition: Condition,
    guidance: Guidance,
    sampler: Sampler | None,
) -> None:
    """Raise ValueError if a rule lacks a reference, a condition, or a sampler that it works with.

    Args:
        process: process of the network.
        knots: levels between which the sampler steps.
        condition: labels, values by name, or None.
        guidance: guidance rule.
        sampler: numerical integrator; None: an algorithm that needs the posterior mean.
    """
    required = [
        (reference, step.level)
        for step in _steps(process, knots)
        for reference in guidance.required_references(step, None)
    ]
    for reference in dict.fromkeys(reference for reference, _ in required):
        reference.check(process, condition, str(guidance))
    for reference, level in required:
        reference.check_level(level)
    guidance.check(process, _given_labels(condition))
    if required:
        require_posterior_mean(process, f"{guidance}, which extrapolates predictions,")
    if sampler is None:
        require_posterior_mean(process, "this algorithm")
        return
    check_estimate(sampler, process)
    if not guidance.is_consistent and not sampler.is_direct:
        raise ValueError(
            f"{guidance} breaks x = α x_0 + σ ε, which {sampler} relies on: use a sampler of "
            "first-order steps such as DDIM(), or CFG"
        )
    if guidance.requires_one_evaluation_per_step and (
        sampler.is_adaptive or sampler.evaluations(knots) != len(knots) - 1
    ):
        raise ValueError(
            f"{guidance} requires one evaluation per step: use a sampler such as DDIM(), not "
            f"{sampler}"
        )


def _given_labels(condition: Condition) -> Condition:
    """The class labels among the conditions that a caller passes."""
    if isinstance(condition, Conditions):
        return condition.label
    return condition.get(LABEL) if isinstance(condition, Mapping) else condition


@contextmanager
def evaluation_mode(*denoisers: object) -> Iterator[None]:
    """Put networks into evaluation mode, and restore their modes on exit.

    A network in evaluation mode is not changed, so that threads can share it.

    Args:
        *denoisers: networks, or denoisers around one; other objects are ignored.

    Returns:
        A context manager.
    """
    networks = [
        denoiser if isinstance(denoiser, nn.Module) else getattr(denoiser, "network", None)
        for denoiser in denoisers
    ]
    training = [
        network for network in networks if isinstance(network, nn.Module) and network.training
    ]
    modes = [(module, module.training) for network in training for module in network.modules()]
    for network in training:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
