"""Loss weights: one function w(λ) on the squared x_0 error. The loss is w(λ) |x̂_0 - x_0|²,
whatever the network outputs.

In the network's own target F the same loss is w_F(λ) |F̂ - F|² with w_F = w |∂x_0/∂F|²: w_eps =
w/SNR, w_v = w/(SNR+1), w_flow = w/(1+√SNR)². Weights are kept as ln w, so that the quotient is a
difference, and its limits at λ = ±inf are right.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffcore.core.prediction import PredictionType, log_gain

FAR = 1000.0  # beyond the logarithm of every float


class Weight(ABC):
    """w(λ) on the squared x_0 error, in float64 on the host.

    A subclass gives ln w at finite λ, with a tail e^{kλ} at either end.
    """

    @abstractmethod
    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        """Ln w(λ) at finite λ, for data of standard deviation `sigma_data`."""

    def __call__(self, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
        """w(λ), with the right limits at λ = ±inf: 0, finite, or inf."""
        return self.target_weight("sample", logsnr, sigma_data)

    def target_weight(
        self, prediction_type: PredictionType, logsnr: Tensor, sigma_data: float
    ) -> Tensor:
        """w_F(λ) = w(λ) |∂x_0/∂F|², the weight on the squared error of the network's own target."""

        def log_weight(logsnr: Tensor) -> Tensor:
            return self.log(logsnr, sigma_data) + log_gain(prediction_type, logsnr, sigma_data)

        logsnr = logsnr.to("cpu", torch.float64)
        end = logsnr.sign() * FAR
        last = log_weight(end)
        slope = log_weight(end + logsnr.sign()) - last  # towards that end
        limit = torch.where(slope.abs() < 1e-9, last, slope.sign() * math.inf)
        infinite = logsnr.isinf()
        return torch.where(infinite, limit, log_weight(logsnr.masked_fill(infinite, 0.0))).exp()


@dataclass(frozen=True)
class MSE(Weight):
    """w = 1 / |∂x_0/∂F|²: the plain squared error of a target F, which need not be the network's
    own.

    epsilon: SNR;  sample: 1;  v_prediction: SNR + 1;  flow_prediction: (1 + √SNR)²;  edm: SNR +
    1/s², which is EDM's weight.

    Args:
        target: the quantity whose squared error counts.
    """

    target: PredictionType = "v_prediction"

    def __post_init__(self) -> None:
        if self.target not in get_args(PredictionType):
            raise ValueError(
                f"target is {self.target!r}, expected one of {', '.join(get_args(PredictionType))}"
            )

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -log_gain(self.target, logsnr, sigma_data)


@dataclass(frozen=True)
class EDM(Weight):
    """w = SNR + 1/s² = (σ² + s²) / (σ s)² with σ = σ/α: 1 on the output of the preconditioned
    network (equal to MSE("edm")).

    Karras et al. 2022 (2206.00364, Table 1, λ(σ)).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -log_gain("edm", logsnr, sigma_data)


@dataclass(frozen=True)
class ELBO(Weight):
    """w = SNR / 2, ½ on the ε error: with `corrected` the loss is the evidence bound's diffusion
    term, nats a dimension.

    -½ ∫ |x_0 - x̂_0|² dSNR = ½ ∫ |ε - ε̂|² dλ does not depend on the schedule between its ends.
    Kingma et al. 2021 (2107.00630, eq. 18).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr - math.log(2)


@dataclass(frozen=True)
class MinSNR(Weight):
    """w = min(SNR, γ). Hang et al. 2023 (2303.09556, eq. 9); on ε it is min(1, γ/SNR), on v
    min(SNR, γ)/(SNR+1).

    Args:
        gamma: γ > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr.clamp(max=math.log(self.gamma))


@dataclass(frozen=True)
class SoftMinSNR(Weight):
    """w = SNR γ / (SNR + γ), the smooth minimum of both. Crowson et al. 2024 (2401.11605, whose γ
    of 4 is 1/s² at s = ½).

    Args:
        gamma: γ > 0.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        bound = math.log(self.gamma)
        return bound + logsigmoid(logsnr - bound)


@dataclass(frozen=True)
class SigmoidWeight(Weight):
    """w = SNR sigmoid(b - λ): VDM++'s monotone weight sigmoid(b - λ) on the ε error, equal to
    SoftMinSNR(e^b).

    Kingma & Gao 2023 (2303.00848, section 5); its weight is of ∫ dλ, so take it with `corrected`.

    Args:
        bias: b.
    """

    bias: float = 2.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"bias is {self.bias}, expected a finite λ")

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr + logsigmoid(self.bias - logsnr)


@dataclass(frozen=True)
class TruncatedSNR(Weight):
    """w = max(SNR, minimum): the ε loss that does not vanish for x_0 at pure noise.

    Salimans & Ho 2022 (2202.00512, section 4, "truncated SNR", minimum = 1).

    Args:
        minimum: > 0.
    """

    minimum: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("minimum", self.minimum)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr.clamp(min=math.log(self.minimum))


@dataclass(frozen=True)
class P2(Weight):
    """w = SNR / (k + SNR)^γ, that is 1/(k + SNR)^γ on the ε error. Choi et al. 2022 (2204.00227,
    eq. 8).

    Args:
        k: > 0.
        gamma: γ ≥ 0; 0 is the plain ε error.
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("k", self.k)
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}, expected a finite exponent of at least 0")

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        shift = math.log(self.k)
        return logsnr - self.gamma * (shift - logsigmoid(shift - logsnr))


@dataclass(frozen=True)
class DebiasedWeight(Weight):
    """w = √SNR, that is 1/√SNR on the ε error and √SNR/(SNR+1) on v. Yu et al. 2023 (2310.08442,
    eq. 14).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr / 2


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")
