"""Recall and saturation over w, and the similarity of cheaper guidance to CFG at equal seeds.

One perceptron for each seed, with v, the cosine schedule and Min-SNR, draws 500 digits by each rule
over the common λ knots, in 20 steps of DDIM unless the name states another number.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.evaluation.neighbours import neighbour_scores
from diffcore.guidance import APG, CFG, AdaptiveGuidance, Guidance, Interval
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MinSNR
from diffcore.samplers import DDIM
from diffcore.sampling.generation import Samples, sample
from diffcore.training.data import Digits
from experiments.claims.arms import ARMS
from experiments.claims.network import Perceptron, digits_data, train
from experiments.guidance import count_references, measure_quality
from experiments.study import continue_study, sample_seeds
from experiments.training import KNOTS

__all__ = ["RULES", "measure", "run_study", "similarity", "train_network"]

TRAINING_STEPS = 1000
STEPS = 20
COUNT = 500
SCALES = (1.0, 3.0, 10.0)
CONDITIONAL = "conditional"
FEWER_STEPS = "CFG, 15 steps"
RULES: dict[str, Callable[[float], Guidance]] = {
    "CFG": CFG,
    FEWER_STEPS: CFG,
    "APG": APG,
    "APG, r = 1": lambda w: APG(w, threshold=1.0),
    "Interval(CFG)": lambda w: Interval(CFG(w), low=0.19, high=1.61, sigma_data=0.5),
    "AdaptiveGuidance(CFG), 0.9": lambda w: AdaptiveGuidance(CFG(w), 0.9),
    "AdaptiveGuidance(CFG), 0.95": lambda w: AdaptiveGuidance(CFG(w), 0.95),
}
"""Compared rules as functions of w; w = 1 is the conditional model."""


def train_network(seed: int, steps: int = TRAINING_STEPS) -> Denoiser:
    """Train the network of a seed.

    Args:
        seed: seed of the training.
        steps: optimizer steps.

    Returns:
        The network with its averaged weights, in evaluation mode.
    """
    process = ARMS["cosine, v"].process
    trained = train(Perceptron, process, Objective(MinSNR()), digits_data(), seed, [steps])
    return next(trained)[1].eval()


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all rules, scales and seeds that a file does not contain yet; w = 1 is one cell.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the samples.

    Yields:
        The lines that are appended to the file.
    """
    rules = [(CONDITIONAL, 1.0), *((name, w) for w in SCALES if w != 1 for name in RULES)]
    cells = [(*rule, seed) for seed in seeds for rule in rules]
    network = lru_cache(maxsize=1)(train_network)
    return continue_study(
        out,
        ("rule", "scale", "seed"),
        cells,
        lambda name, scale, seed: [measure(network(seed), name, scale, seed)],
    )


def measure(
    denoiser: Denoiser, name: str, scale: float, seed: int, count: int = COUNT
) -> dict[str, Any]:
    """Measure the samples of a rule.

    Args:
        denoiser: trained network.
        name: name of the rule.
        scale: value of w.
        seed: seed of the samples.
        count: number of samples.

    Returns:
        `measure_quality` of the samples; precision and recall against the training scans;
        evaluations of a sample that is drawn alone; and psnr, the `similarity` to CFG.
    """
    labels = torch.arange(count) % 10
    rule = RULES.get(name, CFG)(scale)
    samples = _draw(denoiser, rule, 15 if name == FEWER_STEPS else STEPS, seed, labels)
    same = _draw(denoiser, CFG(scale), STEPS, seed, labels).x
    scores = neighbour_scores(samples.x.clamp(-1, 1), Digits("train").x0)
    evaluations = samples.evaluations
    if isinstance(rule, AdaptiveGuidance):
        seeds = torch.tensor(sample_seeds(seed, count))
        counts = count_references(denoiser, rule, seeds, labels)
        evaluations = STEPS + float(counts.double().mean())
    return {
        **measure_quality(samples.x, labels),
        "precision": scores.precision,
        "recall": scores.recall,
        "evaluations": evaluations,
        "psnr": similarity(samples.x, same),
    }


def _draw(denoiser: Denoiser, rule: Guidance, steps: int, seed: int, labels: Tensor) -> Samples:
    return sample(
        denoiser,
        DDIM(),
        KNOTS,
        steps,
        seeds=sample_seeds(seed, len(labels)),
        condition=labels,
        guidance=rule,
        batch_size=len(labels),
    )


def similarity(x: Tensor, y: Tensor) -> float | None:
    """The mean peak signal-to-noise ratio of pairs of images within [-1, 1], in decibels.

    Args:
        x: (N, *shape) images, which are clamped.
        y: (N, *shape) images, which are clamped.

    Returns:
        The mean of 10 log10(4 / MSE), at most 100 for each pair; None if all pairs are equal.
    """
    errors = (x.clamp(-1, 1) - y.clamp(-1, 1)).flatten(1).square().mean(1)
    if not errors.any():
        return None
    return float((10 * math.log10(4) - 10 * errors.clamp(min=4e-10).log10()).mean())
