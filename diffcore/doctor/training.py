"""Checks that train: a network on one fixed batch, in memory, and some steps of the run itself.

Nothing is written, and the network is thrown away.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffcore.core.conditions import (
    batch_condition,
    condition_arguments,
    null_condition,
    without,
)
from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.doctor.findings import Finding
from diffcore.sampling.generation import evaluation_mode
from diffcore.training.construction import build_state
from diffcore.training.data.order import Batch
from diffcore.training.loop import advance, training_batches
from diffcore.training.optimization.gradients import apply_gradient, frozen
from diffcore.training.optimization.optimizers import set_learning_rate
from diffcore.training.state import TrainState

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["Overfit", "Timing", "check_overfit", "check_training", "measure_steps", "overfit_batch"]

OVERFIT_STEPS, OVERFIT_BATCH = 40, 32
FALL = 0.7
"""Largest ratio of the loss at the end to that at the start of a sound overfit."""
USED = 1e-4
"""Smallest relative change of the output by an input that counts as used."""
TIMED_STEPS, TIMED_SECONDS = 10, 20.0
LEVELS = (0.1, 0.9)
"""Times t between which the output of a network must change."""


@dataclass(frozen=True)
class Overfit:
    """The training of a network on one fixed batch, at fixed noise and levels.

    Args:
        losses: mean weighted loss before each step and after the last.
        norms: gradient norm of each step, before clipping.
        unused: names of the trained parameters without a gradient other than 0 in any step.
        batch: the batch.
    """

    losses: list[float]
    norms: list[float]
    unused: list[str]
    batch: Batch


@dataclass(frozen=True)
class Timing:
    """The time of the steps of a run.

    Args:
        step: seconds of one optimizer step with its data, the median.
        steps: number of steps that were timed.
        peak: largest memory of the device during them in bytes; 0 on the host, where it is unknown.
    """

    step: float
    steps: int
    peak: int


def check_training(settings: "Trainer") -> tuple[list[Finding], TrainState, Timing]:
    """Overfit one batch, evaluate what the network learnt from it, and time some steps.

    Args:
        settings: settings of the run, whose data is ready.

    Returns:
        The findings; the state, whose optimizer holds its memory; and the time of a step.

    Raises:
        ValueError: the network cannot be built, or does not fit the process.
    """
    state = build_state(replace(settings, trackers=[], resume=False, init=""))
    timing = measure_steps(state)
    overfit = overfit_batch(state)
    findings = check_overfit(overfit, settings)
    if math.isfinite(overfit.losses[-1]):
        findings += _check_inputs(state, overfit.batch)
    return findings, state, timing


def measure_steps(state: TrainState) -> Timing:
    """Take some steps of the run as training takes them, and time them.

    Args:
        state: state of the run; changed in place.

    Returns:
        The time of a step and the memory; the first step, which allocates, is left out.
    """
    device = state.accelerator.device
    is_cuda = device.type == "cuda"
    count = max(min(TIMED_STEPS, state.settings.steps), 1)
    batches = training_batches(state, state.step + count)
    seconds: list[float] = []
    while len(seconds) < count and sum(seconds) < TIMED_SECONDS:
        start = time.perf_counter()
        advance(state, batches)
        if is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[1:] or seconds)
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else 0
    return Timing(timed[len(timed) // 2], len(timed), peak)


def overfit_batch(state: TrainState, steps: int = OVERFIT_STEPS) -> Overfit:
    """Train on the first samples of the run again and again, with their noise and their levels.

    The learning rate is the peak of the run's after five steps.

    Args:
        state: state of the run; its network is changed in place.
        steps: number of optimizer steps.

    Returns:
        Losses, gradient norms, and the parameters that received no gradient.
    """
    settings, accelerator = state.settings, state.accelerator
    batch = _first_samples(state)
    draw = state.draw(batch, state.sample_key(0, batch.batch_index))
    named = [(name, p) for name, p in state.trained.named_parameters() if p.requires_grad]
    silent = {name for name, _ in named}
    losses, norms = [], []

    def watch(norm: Tensor) -> None:
        norms.append(float(norm))
        silent.difference_update(
            name for name, p in named if p.grad is not None and bool(p.grad.any())
        )

    for step in range(steps + 1):
        with frozen(state.further_modules()):
            loss = state.losses(batch, draw).mean()
        losses.append(float(loss.detach()))
        if step == steps or not math.isfinite(losses[-1]):
            break
        set_learning_rate(state.optimizer.optimizer, settings.lr.peak * min(1.0, (step + 1) / 5))
        accelerator.backward(loss * settings.accumulation)
        apply_gradient(accelerator, state.optimizer, settings.clip, watch)
    return Overfit(losses, norms, [name for name, _ in named if name in silent], batch)


def _first_samples(state: TrainState) -> Batch:
    """At most OVERFIT_BATCH samples of the first micro-batch, in whole groups of the coupling."""
    batch = next(iter(training_batches(state, state.step + 1)))
    group = state.settings.objective.coupling.group
    return batch.first(max(OVERFIT_BATCH // group, 1) * group)


def check_overfit(overfit: Overfit, settings: "Trainer") -> list[Finding]:
    """Judge the training on one batch.

    Args:
        overfit: what was measured.
        settings: settings of the run.

    Returns:
        The findings: fall of the loss, gradient norm, unused parameters.
    """
    return [_loss_fall(overfit, settings), _gradient(overfit, settings), _unused(overfit)]


def _loss_fall(overfit: Overfit, settings: "Trainer") -> Finding:
    name, first, last = "overfit one batch", overfit.losses[0], overfit.losses[-1]
    values = {"losses": overfit.losses}
    text = (
        f"the loss of {len(overfit.batch.x0)} fixed samples goes from {first:.4g} to {last:.4g} in "
        f"{len(overfit.norms)} steps"
    )
    if math.isfinite(last) and settings.objective.is_surrogate:
        kind = type(settings.objective).__name__
        return Finding(
            name,
            "ok",
            f"{text}; only the gradient of {kind} has a meaning, so it need not fall.",
            values,
        )
    if not math.isfinite(last):
        return Finding(
            name,
            "wrong",
            f"{text}: it is not finite; look for NaN in the data or the network, and set a smaller "
            "lr.peak.",
            values,
        )
    if last <= FALL * first:
        return Finding(name, "ok", f"{text}.", values)
    if last < 0.98 * first:
        return Finding(
            name,
            "warning",
            f"{text}, expected at most {FALL:g} times the start: usual for fine-tuning and small "
            f"learning rates; otherwise raise lr.peak, which is {settings.lr.peak:g}.",
            values,
        )
    return Finding(
        name,
        "wrong",
        f"{text}, expected at most {FALL:g} times the start: the network does not learn at lr.peak "
        f"{settings.lr.peak:g}; it is too large or too small, or the output does not depend on the "
        "trained weights.",
        values,
    )


def _gradient(overfit: Overfit, settings: "Trainer") -> Finding:
    name, norms = "gradient norm", overfit.norms
    values = {"norms": norms, "clip": settings.clip}
    if not norms or not all(map(math.isfinite, norms)):
        return Finding(
            name,
            "wrong",
            "the gradient is not finite: look for NaN in the data or the network, and set a "
            "smaller lr.peak, or precision: no.",
            values,
        )
    clipped = sum(norm > settings.clip for norm in norms)
    text = f"finite, from {norms[0]:.3g} to {norms[-1]:.3g}, clipped at {settings.clip:g}"
    if not any(norms):
        return Finding(
            name, "wrong", "the gradient is 0: no trained weight affects the loss.", values
        )
    if clipped == len(norms):
        return Finding(
            name,
            "warning",
            f"{text} in every step, so that only its direction counts: set a larger clip.",
            values,
        )
    return Finding(name, "ok", f"{text} in {clipped} of {len(norms)} steps.", values)


def _unused(overfit: Overfit) -> Finding:
    name, unused = "unused parameters", overfit.unused
    if not unused:
        return Finding(name, "ok", "every trained parameter receives a gradient.", {"unused": []})
    return Finding(
        name,
        "warning",
        f"{len(unused)} trained parameters receive no gradient, such as {unused[0]}: the network "
        "does not use them; training on several ranks fails on them, and they cost memory.",
        {"unused": unused},
    )


@torch.no_grad()
def _check_inputs(state: TrainState, batch: Batch) -> list[Finding]:
    """Whether the output of the network depends on the time and on the label."""
    process, denoiser = state.settings.process, state.denoiser
    x0 = batch.x0.to(state.accelerator.device)
    with evaluation_mode(denoiser):
        findings = [_time_use(denoiser, x0)]
        if process.classes:
            findings.append(_condition_use(denoiser, x0))
        names = process.conditions
        findings += [_named_condition_use(denoiser, batch, name) for name in names]
    return findings


def _time_use(denoiser: Denoiser, x0: Tensor) -> Finding:
    """Evaluate the network at one input and two times."""
    process = denoiser.process
    numbers = [process.time(process.schedule.level(t)) for t in LEVELS]
    x = x0 / max(float(x0.std()), 1e-6)
    first, second = (_raw_output(denoiser, x, float(number)) for number in numbers)
    change = _relative_change(first, second)
    text = (
        f"the output changes by {change:.2g} of its size between the time inputs "
        f"{float(numbers[0]):.4g} and {float(numbers[1]):.4g}"
    )
    values = {"change": change}
    if change < USED:
        return Finding(
            "time conditioning",
            "wrong",
            f"{text}: the network ignores the time; use the argument `time` in its forward.",
            values,
        )
    return Finding("time conditioning", "ok", f"{text}.", values)


def _raw_output(denoiser: Denoiser, x: Tensor, number: float) -> Tensor:
    condition = null_condition(denoiser.process, len(x), x.device)
    arguments = condition_arguments(denoiser.process, condition, x.dtype)
    time_input = torch.full((len(x),), number, device=x.device)
    return extract_tensor(denoiser.network(x, time_input, **arguments))


def _condition_use(denoiser: Denoiser, x0: Tensor) -> Finding:
    """Evaluate the network at one input under the labels of the batch and the null label."""
    process = denoiser.process
    level = process.schedule.level(0.5)
    labels = torch.arange(len(x0), device=x0.device) % process.classes
    outputs = [denoiser.output(x0, level, label) for label in (labels, None)]
    change = _relative_change(*outputs)
    text = f"the output changes by {change:.2g} of its size between labels and the null label"
    values = {"change": change}
    if change < USED:
        return Finding(
            "condition",
            "wrong",
            f"{text}: the network ignores the label; use the argument `class_labels` in its "
            "forward.",
            values,
        )
    return Finding("condition", "ok", f"{text}.", values)


def _named_condition_use(denoiser: Denoiser, batch: Batch, name: str) -> Finding:
    """Evaluate the network under the conditions of a batch, with and without one of them."""
    process, device = denoiser.process, denoiser.device
    given = batch_condition(process, batch.label, batch.extras, device)
    assert given is not None
    x, level = batch.x0.to(device), process.schedule.level(0.5)
    outputs = [denoiser.output(x, level, c) for c in (given, without(process, given, (name,)))]
    change = _relative_change(*outputs)
    finding = "condition " + name
    text = f"the output changes by {change:.2g} of its size with and without {name}"
    if change < USED:
        text += f": the network ignores it; use the argument `{name}` in its forward"
        # A branch that begins with zero convolutions is ignored before the first step.
        return Finding(finding, "warning", f"{text}.", {"change": change})
    return Finding(finding, "ok", f"{text}.", {"change": change})


def _relative_change(first: Tensor, second: Tensor) -> float:
    size = float(first.double().square().mean().sqrt())
    change = float((second - first).double().square().mean().sqrt())
    return change / max(size, 1e-12)
