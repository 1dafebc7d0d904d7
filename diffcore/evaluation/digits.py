"""How good a model of the digits is: share recognised, and Fréchet distance to scans that it was not trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoise
from diffcore.core.noise import permutation
from diffcore.evaluation.metrics import Reader, frechet_distance
from diffcore.guidance import CFG, Guidance
from diffcore.samplers import DDIM, Sampler
from diffcore.sampling.generation import sample
from diffcore.schedules import Grid, Trailing
from diffcore.training.data import Digits


@dataclass(frozen=True)
class Score:
    """What `score` found. Distances are between pixels, in the scans' own units (0 to 16).

    Args:
        count: samples made.
        recognised: share of them that a support vector machine, trained on the training scans, reads as their label.
        recognised_real: the same share of the held-out scans.
        distance: Fréchet distance of the samples to the held-out scans.
        distance_real: that of as many training scans.
    """

    count: int
    recognised: float
    recognised_real: float
    distance: float
    distance_real: float

    def __str__(self) -> str:
        return (
            f"recognised by an SVM trained on real scans: {self.recognised:.1%} of {self.count} samples "
            f"({self.recognised_real:.1%} of the held-out real scans)\n"
            f"Fréchet distance to the held-out scans, in pixels: {self.distance:.0f} "
            f"({self.distance_real:.0f} for {self.count} real training scans: {self.distance / self.distance_real:.2f} x)"
        )


def score(
    denoiser: Denoise,
    sampler: Sampler = DDIM(),
    grid: Grid = Trailing(),
    steps: int = 25,
    guidance: Guidance = CFG(1.5),
    per_label: int = 50,
) -> Score:
    """Sample each digit `per_label` times (seeds 0, 1, ...) and compare with the real scans."""
    train, test = Digits("train"), Digits("test")
    labels = torch.arange(10).repeat_interleave(per_label)
    seeds = range(len(labels))
    made = sample(
        denoiser,
        sampler,
        grid,
        steps,
        seeds=seeds,
        condition=labels,
        guidance=guidance,
        batch_size=100,
    ).x
    reader = Reader(train.x0, train.labels)
    real = train.x0[permutation(0, 0, len(train))[: len(labels)]]
    return Score(
        len(labels),
        reader.recognised(made.clamp(-1, 1), labels),
        reader.recognised(test.x0, test.labels),
        frechet_distance(scan(made), scan(test.x0)),
        frechet_distance(scan(real), scan(test.x0)),
    )


def scan(x0: Tensor) -> Tensor:
    """x_0 in the scans' units."""
    return (x0.clamp(-1, 1) + 1) * 8
