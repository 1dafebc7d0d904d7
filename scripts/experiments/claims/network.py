"""The small network of these studies, and its training.

A perceptron costs a thirtieth of the UNet of the other studies for each image of 64 pixels. Levels,
noise and loss are those of `diffcore.objectives`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, derive_seed, uniform
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.training.data import Digits
from diffcore.training.optimization.lr import LearningRate

__all__ = ["BATCH", "Perceptron", "TrainingData", "batch_loss", "digits_data", "train"]

BATCH = 64
"""Samples in each training step."""
DECAY = 0.995
"""Decay of the averaged weights."""
CLASSES = 10


class Perceptron(nn.Module):
    """A perceptron with residual blocks, each of which receives the time and the label.

    Args:
        size: number of elements of x.
        classes: number of classes without the null label; 0: an unconditional network.
        width: number of hidden units.
        blocks: number of residual blocks.
        uses_time: False ignores the time: the network sees x and the label alone.
    """

    def __init__(
        self,
        size: int = 64,
        classes: int = CLASSES,
        width: int = 256,
        blocks: int = 3,
        uses_time: bool = True,
    ) -> None:
        super().__init__()
        self.uses_time = uses_time
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) * 6 / 15))
        self.time, self.enter, self.leave = (
            nn.Linear(32, width),
            nn.Linear(size, width),
            nn.Linear(width, size),
        )
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.blocks = nn.ModuleList(_block(width) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        phase = time[:, None] * self.frequencies if self.uses_time else 0 * x.flatten(1)[:, :16]
        condition = self.time(torch.cat((phase.sin(), phase.cos()), 1).to(x.dtype))
        if self.label is not None and class_labels is not None:
            condition = condition + self.label(class_labels)
        condition, hidden = nn.functional.silu(condition), self.enter(x.flatten(1))
        for shift, block in zip(self.shifts, self.blocks, strict=True):
            hidden = hidden + block(hidden + shift(condition))
        return self.leave(hidden).view_as(x)


def _block(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, width),
    )


class TrainingData(NamedTuple):
    """Data that fit into memory.

    Args:
        x0: clean samples (N, *shape).
        labels: int64 class labels (N,); None for a process without classes.
    """

    x0: Tensor
    labels: Tensor | None = None


def digits_data() -> TrainingData:
    """The training scans of the digits with their labels."""
    scans = Digits("train")
    return TrainingData(scans.x0, scans.labels)


def train(
    network: Callable[[], nn.Module],
    process: Process,
    objective: Objective,
    data: TrainingData,
    seed: int,
    points: Iterable[int],
) -> Iterator[tuple[int, Denoiser]]:
    """Train a network with AdamW at 1e-3 after 50 steps of warm-up.

    Args:
        network: function that builds the network.
        process: diffusion process.
        objective: loss and its weight.
        data: training data, from which each batch is drawn with replacement.
        seed: seed of the weights, the batches and the noise.
        points: numbers of steps.

    Yields:
        Each number of steps in ascending order, and the network with its averaged weights after
        them; the next training steps change it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.MODEL, 0))
        denoiser = Denoiser(network(), process)
    points = sorted(points)
    average = AveragedModel(denoiser.network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), fused=True)
    for step in range(points[-1]):
        optimizer.param_groups[0]["lr"] = LearningRate(1e-3, warmup=50)(step, points[-1])
        loss = batch_loss(denoiser, objective, data, seed, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(denoiser.network)
        if step + 1 in points:
            yield step + 1, Denoiser(average.module, process)


def batch_loss(
    denoiser: Denoiser, objective: Objective, data: TrainingData, seed: int, step: int
) -> Tensor:
    """The mean loss of the batch of a step.

    Args:
        denoiser: network with its process.
        objective: loss and its weight.
        data: training data.
        seed: seed of the run.
        step: number of the step.

    Returns:
        The loss, a scalar.
    """
    key = SampleKey(seed, step, torch.arange(BATCH), BATCH)
    rows = (uniform(seed, Stream.ORDER, key.position)[:, 0] * len(data.x0)).long()
    labels = None if data.labels is None else data.labels[rows]
    return objective(denoiser, data.x0[rows], labels, objective.draw(denoiser.process, key)).mean()
