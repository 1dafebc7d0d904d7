"""The process that a network was trained on, by its denoising error under each hypothesis.

    score = mean over λ of ln( E|x̂_0 - x_0|² / e(λ) ),   e(λ) = s² σ² / (α² s² + σ²)

e(λ) is the error of the best linear denoiser of data with standard deviation s in each element. A
network that receives what it was trained on is better than it at every level. Under a wrong
prediction type, schedule or time conditioning it is worse, mostly by orders of magnitude.
All hypotheses are compared on the same data, noise and λ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process, TimeConditioning
from diffcore.core.random import Stream, normal
from diffcore.sampling.generation import evaluation_mode
from diffcore.schedules import Cosine, Discrete, Flow, Normal, Schedule, Shifted, ZeroTerminalSNR

__all__ = [
    "SCHEDULES",
    "Score",
    "best_scores",
    "describe",
    "identify_process",
    "process_hypotheses",
    "score_difference",
]

LOGSNR = (-4.0, 4.0)
"""Interval of λ that every hypothesis contains."""
TOLERANCE = 0.003
"""Difference of scores that does not decide."""
LINEAR, SCALED = Discrete(), Discrete("scaled_linear", None, 0.00085, 0.012)
SCHEDULES: dict[str, Schedule] = {
    "linear (DDPM)": LINEAR,
    "linear, zero terminal SNR": ZeroTerminalSNR(LINEAR),
    "scaled linear (Stable Diffusion)": SCALED,
    "scaled linear, zero terminal SNR": ZeroTerminalSNR(SCALED),
    "cosine": Cosine(),
    "cosine, shifted to half the resolution": Shifted.by_input_scale(Cosine(), 0.5),
    "cosine table (iDDPM)": Discrete("cosine"),
}
"""Schedules of vp networks, by their name. Flow and EDM networks have one hypothesis each."""
INDEX, TIME = TimeConditioning("index", 1000.0), TimeConditioning("t", 1.0)


class Score(NamedTuple):
    """How well a network denoises under a hypothesis.

    Args:
        name: name of the hypothesis.
        process: the hypothesis.
        score: mean over λ of the log ratio of its error to that of the best linear denoiser; below
            0 if the network is better.
        ratios: the ratio at each λ, from noise to clean.
        image_ratios: the ratio of each image's error to that of the best linear denoiser, one
            tuple of images for each λ.
    """

    name: str
    process: Process
    score: float
    ratios: tuple[float, ...]
    image_ratios: tuple[tuple[float, ...], ...] = ()


def process_hypotheses(base: Process) -> dict[str, Process]:
    """The processes on which published networks are trained.

    Args:
        base: shape, range, classes and standard deviation of the data.

    Returns:
        Processes by a description: ε, v and x_0 on each schedule of `SCHEDULES`, conditioned on the
        index or on t; flow with t or 1000 t; EDM. ε is left out where a table ends in pure noise.
    """
    found = {}
    for prediction in ("epsilon", "v_prediction", "sample"):
        for name, schedule in SCHEDULES.items():
            if prediction == "epsilon" and isinstance(schedule, ZeroTerminalSNR):
                continue  # ε does not determine x_0 at pure noise
            for number, time in (("index", INDEX), ("t", TIME)):
                found[f"{prediction}, {name}, conditioned on {number}"] = replace(
                    base, schedule=schedule, prediction=prediction, time=time
                )
    for number, scale in (("t", 1.0), ("1000 t", 1000.0)):
        time = TimeConditioning("blend", scale)
        found[f"flow_prediction, flow, conditioned on {number}"] = replace(
            base, schedule=Flow(), prediction="flow_prediction", time=time
        )
    found["edm, any schedule, conditioned on ln(σ)/4"] = replace(
        base,
        schedule=Normal.edm(),
        prediction="edm",
        time=TimeConditioning("logsnr", -0.125),
    )
    return found


@torch.no_grad()
def identify_process(
    network: nn.Module,
    x0: Tensor,
    hypotheses: Mapping[str, Process],
    levels: int = 9,
    seed: int = 0,
    condition: Tensor | None = None,
    batch_size: int = 64,
) -> list[Score]:
    """Rank processes by how well a network denoises under each.

    Args:
        network: the network, on the device of its evaluation.
        x0: (N, *shape) data of the kind that the network was trained on; 64 images are enough for
            most networks.
        hypotheses: processes by their name, such as those of `process_hypotheses`.
        levels: number of λ, evenly spaced over [-4, 4].
        seed: seed of the noise.
        condition: labels (N,) of the data; None for the null label.
        batch_size: number of images in each evaluation of the network.

    Returns:
        One score for each hypothesis, the best first. A hypothesis under which the network fails
        with an error is left out.

    Raises:
        ValueError: the data is constant, or the network fails under every hypothesis.
    """
    s = float(x0.std())
    if not 0 < s < math.inf:
        raise ValueError(
            f"the standard deviation of the data is {s}, expected data that varies and is finite"
        )
    low, high = LOGSNR
    logsnrs = [low + (high - low) * i / max(levels - 1, 1) for i in range(levels)]
    noise = normal(seed, Stream.NOISE, torch.arange(len(x0)), tuple(x0.shape[1:]), x0.device)
    scores, failures = [], []
    with evaluation_mode(network):
        for name, process in hypotheses.items():
            try:
                denoiser = Denoiser(network, replace(process, sigma_data=s))
                errors = [
                    _image_ratios(denoiser, x0, noise, each, s, condition, batch_size)
                    for each in logsnrs
                ]
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                failures.append(f"{name}: {error}")
                continue
            ratios = tuple(sum(each) / len(each) for each in errors)
            scores.append(Score(name, process, _mean_log(ratios), ratios, tuple(errors)))
    if not scores:
        raise ValueError(f"the network fails under every hypothesis, such as {failures[0]}")
    return sorted(scores, key=lambda each: each.score)


def _image_ratios(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Tensor,
    logsnr: float,
    s: float,
    condition: Tensor | None,
    batch_size: int,
) -> tuple[float, ...]:
    """The error of a denoiser on each image at a level over that of the best linear one."""
    level = denoiser.process.schedule.at(logsnr)
    assert isinstance(level.alpha, float)
    assert isinstance(level.sigma, float)
    errors: list[float] = []
    for start in range(0, len(x0), batch_size):
        rows = slice(start, start + batch_size)
        labels = None if condition is None else condition[rows]
        x = level.alpha * x0[rows] + level.sigma * noise[rows]
        error = (denoiser(x, level, labels).x0 - x0[rows]).double().square().flatten(1).mean(1)
        errors += error.tolist()
    variance, unexplained = s**2, level.sigma**2
    best = variance * unexplained / (level.alpha**2 * variance + unexplained)
    return tuple(error / best if math.isfinite(error) else math.inf for error in errors)


def score_difference(score: Score, best: Score) -> tuple[float, float]:
    """Difference of two scores and its standard error over the images.

        d = mean over λ of ln(r_1 / r_2),   r the mean ratio over the images
        standard error: that of the mean over the images of  mean over λ of (r_1i/r_1 - r_2i/r_2)

    Both scores are measured on the same images and noise, so that what is common cancels.

    Args:
        score: score of a hypothesis.
        best: score of another hypothesis by the same call of `identify_process`.

    Returns:
        score - best, and its standard error; inf and 0 if the error of the first is not finite.
    """
    difference = score.score - best.score
    if not math.isfinite(difference):
        return math.inf, 0.0
    first, second = (torch.tensor(each.image_ratios, dtype=torch.float64) for each in (score, best))
    relative = first / first.mean(1, keepdim=True) - second / second.mean(1, keepdim=True)
    images = relative.mean(0)
    return difference, float(images.std() / len(images) ** 0.5) if len(images) > 1 else math.inf


def _mean_log(ratios: Sequence[float]) -> float:
    return sum(math.log(max(ratio, 1e-12)) for ratio in ratios) / len(ratios)


def best_scores(scores: Sequence[Score]) -> list[Score]:
    """The hypotheses between which the errors do not decide.

    The linear table and its zero-terminal-SNR form, for instance, differ only at levels where x
    contains almost nothing of x_0.

    Args:
        scores: scores, the best first.

    Returns:
        Those within TOLERANCE of the best, the best first.
    """
    return [each for each in scores if each.score <= scores[0].score + TOLERANCE]


def describe(scores: Sequence[Score], count: int = 5) -> list[str]:
    """The best hypotheses in plain sentences.

    Args:
        scores: scores, the best first.
        count: number of hypotheses.

    Returns:
        One line for each.
    """
    return [
        f"{each.name}: {math.exp(each.score):.3g} times the error of the best linear denoiser"
        for each in scores[:count]
    ]
