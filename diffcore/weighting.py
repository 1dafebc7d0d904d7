"""Loss weights: one function w(λ) on the squared x_0 error. The loss is w(λ) |x̂_0 - x_0|², whatever the network outputs.

In the network's own target F the same loss is w_F(λ) |F̂ - F|² with w_F = w |∂x_0/∂F|²: w_eps = w/SNR, w_v = w/(SNR+1),
w_flow = w/(1+√SNR)². Weights are kept as ln w, so that the quotient is a difference, and its limits at λ = ±inf are right.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from diffcore.prediction import PredictionType, log_gain

FAR = 80.0


class Weight(ABC):
    """w(λ) on the squared x_0 error. A subclass gives ln w at finite λ, with a tail e^{kλ} at either end."""

    @abstractmethod
    def log(self, logsnr: Tensor) -> Tensor:
        """Ln w(λ) at finite λ."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """w(λ), with the right limits at λ = ±inf: 0, finite, or inf."""
        return self.on("sample", logsnr, 1.0)

    def on(self, kind: PredictionType, logsnr: Tensor, sigma_data: float) -> Tensor:
        """w_F(λ) = w(λ) |∂x_0/∂F|², the weight on the squared error of the network's own target."""

        def log_weight(logsnr: Tensor) -> Tensor:
            return self.log(logsnr) + log_gain(kind, logsnr, sigma_data)

        end = logsnr.sign() * FAR
        last = log_weight(end)
        slope = log_weight(end + logsnr.sign()) - last  # towards that end
        limit = torch.where(slope.abs() < 1e-6, last, slope.sign() * math.inf)
        infinite = logsnr.isinf()
        return torch.where(infinite, limit, log_weight(logsnr.masked_fill(infinite, 0.0))).exp()


@dataclass(frozen=True)
class MSE(Weight):
    """w = 1 / |∂x_0/∂F|²: the plain squared error of a target F, which need not be the network's own.

    epsilon: SNR;  sample: 1;  v_prediction: SNR + 1;  flow_prediction: (1 + √SNR)²;  edm: SNR + 1/s², which is EDM's weight.

    Args:
        target: the quantity whose squared error counts.
        sigma_data: s of edm.
    """

    target: PredictionType = "v_prediction"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.target not in get_args(PredictionType):
            raise ValueError(f"target is {self.target!r}, expected one of {', '.join(get_args(PredictionType))}")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data is {self.sigma_data}, expected a positive standard deviation")

    def log(self, logsnr: Tensor) -> Tensor:
        return -log_gain(self.target, logsnr, self.sigma_data)


@dataclass(frozen=True)
class MinSNR(Weight):
    """w = min(SNR, γ). Hang et al. 2023 (2303.09556, eq. 9); on ε it is min(1, γ/SNR), on v min(SNR, γ)/(SNR+1).

    Args:
        gamma: γ > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}, expected a positive finite number")

    def log(self, logsnr: Tensor) -> Tensor:
        return logsnr.clamp(max=math.log(self.gamma))
