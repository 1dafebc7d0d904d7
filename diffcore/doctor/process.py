"""The process that a network was trained on, against the one that its config describes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.estimate import require_posterior_mean
from diffcore.core.process import Process, TimeConditioning
from diffcore.doctor.findings import Finding
from diffcore.evaluation.identification import (
    TOLERANCE,
    Score,
    best_scores,
    identify_process,
    process_hypotheses,
    score_difference,
)
from diffcore.schedules import Flow, Shifted

__all__ = ["Identification", "check_process", "claimed_hypotheses", "draw_errors", "format_scores"]

DECISIVE = 0.05
"""Difference of scores (5 % of the error) above which two hypotheses are told apart."""
DEVIATIONS = 4.0
"""Number of standard errors by which a difference must exceed 0."""
FLOW_SHIFTS = {"3 (SD3)": 3.0, "e^0.5": math.exp(0.5), "e^1.15": math.exp(1.15)}
"""Time shifts of published flows; Flux shifts by e^0.5 to e^1.15, by the number of tokens."""


class Identification(NamedTuple):
    """The ranking of processes, and the judgement of the one that the config describes.

    Args:
        scores: scores of the hypotheses, the best first.
        claim: name of the hypothesis that the config describes.
        finding: the verdict.
        notes: what the measure cannot tell about this network.
    """

    scores: list[Score]
    claim: str
    finding: Finding
    notes: list[str]


def claimed_hypotheses(claim: Process) -> tuple[str, dict[str, Process]]:
    """The processes among which that of a network is looked for.

    Args:
        claim: process that the config describes.

    Returns:
        The name of the claim, and all processes by their names: those of published networks, flows
        with shifted levels and unshifted times, and the claim with every prediction type.
    """
    found = process_hypotheses(claim)
    for name, shift in FLOW_SHIFTS.items():
        found[
            f"flow_prediction, flow shifted by {name}, conditioned on 1000 t before the shift"
        ] = replace(
            claim,
            schedule=Shifted.by_time_shift(Flow(), shift),
            prediction="flow_prediction",
            time=TimeConditioning("t", 1000.0),
        )
    known = {_key(process): name for name, process in found.items()}
    for prediction in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        try:
            process = replace(claim, prediction=prediction)
        except ValueError:  # such as epsilon on a table that ends in pure noise
            continue
        if _key(process) not in known:
            found[_describe(process)] = process
    if claim.prediction == "edm" and _key(claim) not in known:
        found[_describe(claim)] = claim
    name = known.get(_key(claim), _describe(claim))
    return name, found


def _key(process: Process) -> object:
    """What distinguishes hypotheses of one network.

    Of a network that receives a level itself, the schedule determines only how often each level was
    trained, and not what the network receives.
    """
    reads_level = process.time.variable in ("blend", "logsnr", "sigma")
    schedule: object = process.schedule.scaling if reads_level else process.schedule
    if process.prediction == "edm" and reads_level:
        schedule = "any"
    return process.prediction, schedule, process.time.variable, process.time.scale


def _describe(process: Process) -> str:
    time = process.time
    number = time.variable if time.scale in (1.0, 1000.0) else f"{time.scale:g} {time.variable}"
    return f"{process.prediction}, {process.schedule}, conditioned on {number}"


def check_process(
    denoiser: Denoiser, x0: Tensor, condition: Tensor | None = None, levels: int = 9
) -> Identification:
    """Find the process that a network was trained on, and compare the one of its config.

    Args:
        denoiser: the network with the process that the config describes, on its device.
        x0: data (N, *shape) of the kind that the network was trained on, on the same device.
        condition: labels (N,); None for the null label.
        levels: number of λ.

    Returns:
        The ranking and the verdict.

    Raises:
        ValueError: the data is constant, or the network fails under every hypothesis.
    """
    require_posterior_mean(denoiser.process, "the identification of a process")
    claim, hypotheses = claimed_hypotheses(denoiser.process)
    scores = identify_process(denoiser.network, x0, hypotheses, levels=levels, condition=condition)
    return Identification(scores, claim, _verdict(claim, scores), _notes(scores))


def _verdict(claim: str, scores: Sequence[Score]) -> Finding:
    name, best = "process", scores[0]
    values: dict[str, Any] = {
        "claim": claim,
        "best": [score.name for score in best_scores(scores)],
        "scores": {score.name: score.score for score in scores},
    }
    own = next((score for score in scores if score.name == claim), None)
    if own is None:
        return Finding(
            name,
            "wrong",
            f"the network cannot be evaluated as its config describes ({claim}); it denoises best "
            f"as {best.name}.",
            values,
        )
    difference, error = score_difference(own, best)
    values |= {"difference": difference, "standard error": error}
    if best.score > 0:
        return Finding(
            name,
            "warning",
            f"the network denoises worse than a linear denoiser under every hypothesis (best "
            f"{math.exp(best.score):.3g} times, {best.name}): it is not trained, its process is "
            "not among them, or the images are not of the kind that it was trained on.",
            values,
        )
    if difference > DECISIVE and difference > DEVIATIONS * error:
        return Finding(
            name,
            "wrong",
            f"the config describes {claim}, but the network denoises best as {best.name}: the "
            f"error under the config is {_factor(difference)} times as large; correct the config.",
            values,
        )
    if difference <= TOLERANCE:
        others = len(values["best"]) - 1
        tie = f", and {others} other hypotheses are equal on these images" if others else ""
        return Finding(
            name, "ok", f"the network denoises best as its config describes: {claim}{tie}.", values
        )
    return Finding(
        name,
        "ok",
        f"the config describes {claim}, and {best.name} has an error only "
        f"{difference:.1%} ± {error:.1%} lower, which does not decide.",
        values,
    )


def _factor(difference: float) -> str:
    return f"{math.exp(min(difference, 700.0)):.3g}"


def _notes(scores: Sequence[Score]) -> list[str]:
    """What denoising errors cannot tell about the network."""
    notes: list[str] = []
    if scores[0].score > 0:  # the network denoises under no hypothesis
        return notes
    if scores[0].process.time.variable in ("blend", "logsnr", "sigma"):
        notes.append(
            "The network is conditioned on the noise level itself, so that the schedule and the "
            "shift of its training cannot be measured: they determine only how often each level "
            "was trained. Take the shift from the model card."
        )
    ties = best_scores(scores)
    if len(ties) > 1:
        notes.append(
            "These hypotheses do not differ on these images between λ = -4 and 4: "
            + "; ".join(score.name for score in ties)
            + ". More images (--count) may tell them apart."
        )
    return notes


def format_scores(identification: Identification, count: int = 8) -> list[str]:
    """The table of the best hypotheses, and that of the config.

    Args:
        identification: the ranking.
        count: number of hypotheses.

    Returns:
        Lines: error relative to the best linear denoiser, its excess over the best, and the name.
    """
    scores = identification.scores
    shown = scores[:count] + [s for s in scores[count:] if s.name == identification.claim]
    lines = ["error    excess over the best   hypothesis"]
    for score in shown:
        difference, error = score_difference(score, scores[0])
        excess = f"{math.expm1(min(difference, 700.0)):+.2%} ± {error:.2%}"
        mark = "  <- the config" if score.name == identification.claim else ""
        lines.append(f"{math.exp(min(score.score, 700.0)):<8.4g} {excess:<22} {score.name}{mark}")
    return lines


def draw_errors(identification: Identification, out: str | Path, levels: int = 9) -> None:
    """Draw the error of the best hypotheses and of the config over λ.

    Args:
        identification: the ranking.
        out: file to write.
        levels: number of λ that were measured.
    """
    from diffcore.evaluation.identification import LOGSNR
    from diffcore.report.figures import create_figure, line_styles, save_figure

    scores = identification.scores
    shown = scores[:4] + [s for s in scores[4:] if s.name == identification.claim]
    figure, (axis, *_) = create_figure(1)
    logsnrs = torch.linspace(*LOGSNR, levels)
    for score, style in zip(shown, line_styles(len(shown)), strict=True):
        axis.plot(logsnrs, score.ratios, label=score.name, **style)
    axis.set(
        xlabel="λ = log α²/σ²", ylabel="error / that of the best linear denoiser", yscale="log"
    )
    save_figure(figure, out)
