"""An objective of three networks: a student, a network on its samples, and a critic."""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.objectives.networks import Networks, RunningStatistics, TrainedNetwork
from diffcore.objectives.objective import Objective
from tests.helpers.training_runs import PROCESS, LabelRecorder


class MeanLogit(RunningStatistics):
    """The running mean of the logits of a critic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def update(self, sums):
        self.mean.lerp_((sums[0] / sums[1]).float(), 0.1)


class Critic(nn.Module):
    """One logit for each image, a running mean of them, and a running mean of the image."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.Dropout(dropout), nn.Linear(16, 1))
        self.norm = nn.BatchNorm1d(64, affine=False)
        self.logits = MeanLogit()

    def forward(self, x):
        self.norm(x.flatten(1).detach())
        return self.layers(x.flatten(1))[:, 0] - self.logits.mean


@dataclass(frozen=True)
class ThreeNetworks(Objective):
    """A student that imitates a teacher through a second network and a critic.

    Args:
        updates: updates of the second network in a step.
        options: options of both further networks.
        faulty: step from which the loss of the critic is infinite.
        dropout: dropout of the critic.
    """

    updates: int = 2
    options: dict[str, object] = field(default_factory=dict)
    faulty: int = 10**6
    dropout: float = 0.0
    is_surrogate = True

    @property
    def content_hash(self):
        return "first"

    def networks(self, denoiser, device, label_wrapper):
        teacher = LabelRecorder().eval().requires_grad_(False).to(device)
        return Networks(
            Denoiser(label_wrapper(teacher), PROCESS),
            {
                "fake": TrainedNetwork(
                    copy.deepcopy(denoiser.network), updates=self.updates, **self.options
                ),
                "critic": TrainedNetwork(
                    Critic(self.dropout),
                    optimizer=partial(_adam, betas=(0.0, 0.9)),
                    lr=lambda step, steps: 1e-3 * (1 + step / 6),
                ),
            },
        )

    def network_losses(self, name, denoiser, x0, condition, draw, networks):
        with torch.no_grad():
            sample = denoiser(draw.noise, draw.level, condition).x0
        if name == "fake":
            fake = networks.denoiser("fake", denoiser.process)
            return super().__call__(fake, sample, condition, draw)
        critic = networks.module("critic")
        true, false = critic(torch.cat((x0, sample))).chunk(2)
        loss = (true - 1) ** 2 + (false + 1) ** 2
        return loss * (torch.inf if draw.key.step >= self.faulty else 1.0)

    def __call__(
        self,
        denoiser,
        x0,
        condition,
        draw,
        log_variance=None,
        sample_weight=None,
        networks=None,
    ):
        sample = denoiser(draw.noise, draw.level, condition).x0
        logit, fake = networks.module("critic"), networks.denoiser("fake", denoiser.process)
        value = logit(sample)
        logit.logits.record(torch.stack((value.sum(), value.new_tensor(len(value)))))
        teacher = networks.teacher(sample, draw.level, condition).x0
        error = (fake(sample, draw.level, condition).x0 - teacher).flatten(1)
        return error.square().mean(1) - 0.1 * value


def _adam(parameters, lr, betas):
    return torch.optim.AdamW(parameters, lr, betas=betas)
