"""Checks of settings alone: learning rate, average, null label, effective weight."""

import math
from typing import TYPE_CHECKING

import torch

from diffcore.doctor.findings import Finding
from diffcore.sampling import generation

if TYPE_CHECKING:
    from diffcore.training.averages.ema import Decay
    from diffcore.training.trainer import Trainer

__all__ = ["average_weights", "check_settings"]


def check_settings(settings: "Trainer") -> list[Finding]:
    """Check the settings that need neither data nor network.

    Args:
        settings: settings of the run.

    Returns:
        One finding for each check.
    """
    return [_average(settings), _learning_rate(settings), _null_label(settings)]


def average_weights(decay: "Decay", steps: int) -> tuple[float, float, float]:
    """How an average of decay β(s) is made of the weights after steps s = 1 .. n.

        weight of the initial weights   Π_{s=1..n} β(s)
        weight of the first half        Π_{s=n/2..n} β(s)
        half-life                       largest k with Π_{s=n-k..n} β(s) ≥ 1/2

    Args:
        decay: decay of the average.
        steps: number of steps n.

    Returns:
        The share of the initial weights, the share of the weights up to the middle of the run, and
        the number of last steps that make up half of the average.
    """
    logs = torch.tensor(
        [math.log(max(decay(step), 1e-300)) for step in range(1, steps + 1)], dtype=torch.float64
    )
    backwards = logs.flip(0).cumsum(0)  # ln of the weight of everything before the last k steps
    half_life = int((backwards > -math.log(2)).sum()) + 1
    first_half = float(backwards[max(steps - steps // 2 - 1, 0)].exp())
    return float(backwards[-1].exp()), first_half, min(half_life, steps)


def _average(settings: "Trainer") -> Finding:
    name, decay, steps = "averaged weights", settings.ema, settings.steps
    initial, first_half, half_life = average_weights(decay, steps)
    values = {"initial": initial, "first half": first_half, "half-life": half_life}
    text = f"half of the average is made by the last {half_life} of {steps} steps"
    length = math.log(2) / max(-math.log(max(decay.decay, 1e-300)), 1e-12)
    advice = f"set ema.decay: {_suggested_decay(steps):g}"
    if initial > 0.01 or first_half > 0.1:
        return Finding(
            name,
            "wrong",
            f"{initial:.0%} of the average are the initial weights and {first_half:.0%} are of the "
            f"first half of the run, because the half-life of decay {decay.decay:g} is "
            f"{length:,.0f} steps and the run has {steps}: {advice}.",
            values,
        )
    if length > steps:
        return Finding(
            name,
            "warning",
            f"decay {decay.decay:g} has a half-life of {length:,.0f} steps, more than the {steps} "
            f"of the run: only the warm-up, which limits it to {decay(steps):.4g}, makes it "
            f"useful, and {text}; {advice}, or train longer.",
            values,
        )
    return Finding(name, "ok", f"{text}.", values)


def _suggested_decay(steps: int) -> float:
    """The decay whose half-life is a twentieth of the run, rounded to two digits of 1-β."""
    return 1 - float(f"{math.log(2) / max(steps / 20, 1):.1g}") if steps > 20 else 0.9


def _learning_rate(settings: "Trainer") -> Finding:
    lr, steps, faults = settings.lr, settings.steps, []
    largest = max(lr(step, steps) for step in _steps_to_check(lr.warmup, steps))
    values = {"peak": lr.peak, "warmup": lr.warmup, "largest": largest}
    text = f"rises to {largest:.3g} in {min(lr.warmup, steps)} of {steps} steps ({lr.shape})"
    if lr.warmup >= steps:
        return Finding(
            "learning rate",
            "wrong",
            f"{text}: the warm-up of {lr.warmup} steps does not end within the run; set a smaller "
            "lr.warmup.",
            values,
        )
    if lr.warmup > steps / 2:
        faults.append("the warm-up takes more than half of the run")
    if largest > 0.01:
        faults.append("above 0.01, at which Adam diverges in most networks")
    if largest < 1e-7:
        faults.append("below 1e-7, at which the weights hardly change")
    if faults:
        return Finding("learning rate", "warning", f"{text}: {'; '.join(faults)}.", values)
    return Finding("learning rate", "ok", f"{text}.", values)


def _steps_to_check(warmup: int, steps: int) -> set[int]:
    return {0, min(warmup, steps - 1), steps - 1, steps // 2}


def _null_label(settings: "Trainer") -> Finding:
    name, process = "null label", settings.process
    values = {"classes": process.classes, "dropout": process.dropout}
    if not process.classes:
        return Finding(name, "ok", "the network has no condition, and needs none.", values)
    text = f"{process.dropout:.0%} of the samples have the null label"
    if refusal := _refused_sampling(settings):
        return Finding(name, "wrong", f"{text}, and the run cannot be sampled: {refusal}.", values)
    if not process.dropout:
        return Finding(
            name,
            "warning",
            f"{text}, so that the run cannot be sampled with classifier-free guidance: set "
            "process.dropout: 0.1 if you want it.",
            values,
        )
    if process.dropout > 0.5:
        return Finding(
            name,
            "warning",
            f"{text}, so that most of the training ignores the condition: 0.1 to 0.2 is usual.",
            values,
        )
    return Finding(name, "ok", f"{text}.", values)


def _refused_sampling(settings: "Trainer") -> str:
    """Why samples of a class cannot be drawn with the sampler and guidance of the settings."""
    process = settings.process
    try:
        knots = settings.grid.knots(process.schedule, settings.sample_steps)
        generation.check_sampling(process, knots, [0], [0], settings.guidance, 1, settings.sampler)
    except ValueError as error:
        return str(error)
    return ""
