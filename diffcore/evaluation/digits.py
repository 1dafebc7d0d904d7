"""The quality of a model of the digits: accuracy of its labels, and distance to held-out scans."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.random import permutation
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.evaluation.label_accuracy import LabelClassifier
from diffcore.guidance import CFG, Guidance
from diffcore.samplers import DDIM, Sampler
from diffcore.sampling.generation import sample
from diffcore.schedules import Grid, Trailing
from diffcore.training.data import Digits

__all__ = ["DigitScore", "score_digits", "to_scan_units"]


@dataclass(frozen=True)
class DigitScore:
    """Metrics of samples beside the same metrics of real scans. Distances use pixels from 0 to 16.

    Args:
        count: number of samples.
        accuracy: share of samples that a support vector machine assigns to their labels.
        real_accuracy: the same share of the held-out scans.
        distance: Fréchet distance of the samples to the held-out scans.
        real_distance: Fréchet distance of training scans to the held-out scans: as many as samples,
            or all of them if there are fewer.
    """

    count: int
    accuracy: float
    real_accuracy: float
    distance: float
    real_distance: float

    def __str__(self) -> str:
        return (
            f"recognised by an SVM trained on real scans: {self.accuracy:.1%} of {self.count} "
            f"samples ({self.real_accuracy:.1%} of the held-out real scans)\n"
            f"Fréchet distance to the held-out scans, in pixels: {self.distance:.0f} "
            f"({self.real_distance:.0f} for real training scans: "
            f"{self.distance / self.real_distance:.2f} x)"
        )


def score_digits(
    denoiser: DenoiserProtocol,
    sampler: Sampler = DDIM(),
    grid: Grid = Trailing(),
    steps: int = 25,
    guidance: Guidance = CFG(1.5),
    per_label: int = 50,
) -> DigitScore:
    """Sample every digit with the seeds 0, 1, ... and compare the samples with real scans.

    Args:
        denoiser: network with a process of ten classes and shape (1, 8, 8).
        sampler: numerical integrator.
        grid: rule that places the noise levels.
        steps: number of sampler steps.
        guidance: guidance rule.
        per_label: number of samples of each digit.

    Returns:
        Metrics of the samples and of the real scans.
    """
    train, test = Digits("train"), Digits("test")
    labels = torch.arange(10).repeat_interleave(per_label)
    samples = sample(
        denoiser,
        sampler,
        grid,
        steps,
        seeds=range(len(labels)),
        condition=labels,
        guidance=guidance,
        batch_size=100,
    ).x
    classifier = LabelClassifier(train.x0, train.labels)
    real = train.x0[permutation(0, 0, len(train))[: len(labels)]]
    return DigitScore(
        len(labels),
        classifier.accuracy(samples.clamp(-1, 1), labels),
        classifier.accuracy(test.x0, test.labels),
        frechet_distance(to_scan_units(samples), to_scan_units(test.x0)),
        frechet_distance(to_scan_units(real), to_scan_units(test.x0)),
    )


def to_scan_units(x0: Tensor) -> Tensor:
    """Convert x_0 to the pixel values of the scans.

    Args:
        x0: samples; values outside [-1, 1] are clamped.

    Returns:
        Values from 0 to 16, in the shape of `x0`.
    """
    return (x0.clamp(-1, 1) + 1) * 8
