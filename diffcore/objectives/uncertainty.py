"""Learned uncertainty: the loss of each noise level is divided by its fitted expectation.

    L' = L / e^{u(λ)} + u(λ)

L' is minimal at u(λ) = ln E[L | λ], where the gradients of all levels have the same size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcore.core.random import Stream, normal, uniform

__all__ = ["LogVariance", "Uncertainty"]


class LogVariance(nn.Module):
    """u(λ), a linear function of random Fourier features, 0 at initialisation.

        √2 cos(2π(f_i λ/8 + φ_i)),  f_i ~ N(0, 1),  φ_i ~ U(0, 1)

    Args:
        features: number of features.
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
        """u(λ) of shape (B,), for λ of shape (B,)."""
        bounded = logsnr.clamp(-80, 80) / 8
        features = (
            math.sqrt(2) * (2 * math.pi * (bounded[:, None] * self.frequency + self.phase)).cos()
        )
        with torch.autocast(logsnr.device.type, enabled=False):
            return self.linear(features)[:, 0]


@dataclass(frozen=True)
class Uncertainty:
    """Fits u(λ) of EDM2, trained by the optimizer of the network.

    Source: Karras et al. 2024 (2312.02696, eq. 21 and appendix B.2).

    Args:
        features: number of random Fourier features of λ, at least 1.

    Raises:
        ValueError: there is no feature.
    """

    features: int = 128

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features is {self.features}, expected at least 1")

    def module(self) -> LogVariance:
        """A new module u(λ) for training.

        Returns:
            The module, which is part of the training state and not of the network.
        """
        return LogVariance(self.features)
