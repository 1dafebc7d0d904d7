"""Learned uncertainty: the loss of each noise level is divided by what it is expected to be,
learned beside the network.

L' = L / e^{u(λ)} + u(λ),  least at u(λ) = ln E[L | λ], where every level's gradient has the same
size
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcore.core.random import Stream, normal, uniform


class LogVariance(nn.Module):
    """u(λ), (B,) of λ (B,): linear in the features √2 cos(2π(f_i λ/8 + φ_i)) with f_i ~ N(0, 1),
    φ_i ~ U(0, 1); 0 at first.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequency", normal(0, Stream.MODEL, 0, (features,))[0])
        self.register_buffer("phase", uniform(0, Stream.MODEL, 1, features)[0].float())
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, logsnr: Tensor) -> Tensor:
        bounded = logsnr.clamp(-80, 80) / 8
        features = (
            math.sqrt(2) * (2 * math.pi * (bounded[:, None] * self.frequency + self.phase)).cos()
        )
        with torch.autocast(logsnr.device.type, enabled=False):
            return self.linear(features)[:, 0]


@dataclass(frozen=True)
class Uncertainty:
    """u(λ) of EDM2 (Karras et al. 2024, 2312.02696, eq. 21 and appendix B.2), trained by the
    network's optimizer.

    Args:
        features: random Fourier features of λ.
    """

    features: int = 128

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features is {self.features}, expected at least 1")

    def module(self) -> LogVariance:
        """The u to train; part of the run, not of the model."""
        return LogVariance(self.features)
