"""Loss weights: one function w(λ) of the squared x_0 error, for every prediction type.

The loss is w(λ) |x̂_0 - x_0|². In terms of the network's target F it is w_F(λ) |F̂ - F|² with
w_F = w |∂x_0/∂F|²:

    w_eps = w/SNR,  w_v = w/(SNR+1),  w_flow = w/(1+√SNR)²

Weights are represented as ln w, so that the quotient is a difference and its limits at λ = ±inf
are correct.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffcore.core.prediction import PredictionType, log_gain

__all__ = [
    "EDM",
    "ELBO",
    "MSE",
    "P2",
    "DebiasedWeight",
    "MinSNR",
    "SigmoidWeight",
    "SoftMinSNR",
    "TruncatedSNR",
    "Weight",
]

FAR = 1000.0
"""A |λ| beyond the logarithm of every float, where ln w is linear."""


class Weight(ABC):
    """A weight w(λ) of the squared x_0 error, in float64 on the host.

    A subclass defines ln w at finite λ, which is asymptotically linear in λ at both ends.
    """

    @abstractmethod
    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        """ln w(λ) at finite λ, of the shape of λ.

        Args:
            logsnr: finite λ, float64 on the host.
            sigma_data: standard deviation s of the data; only edm weights and targets depend on it.
        """

    def __call__(self, logsnr: Tensor, sigma_data: float = 0.5) -> Tensor:
        """w(λ), of the shape of λ, with the correct limit at λ = ±inf: 0, finite, or inf.

        Args:
            logsnr: λ, of any shape.
            sigma_data: standard deviation s of the data; only edm weights and targets depend on it.
        """
        return self.target_weight("sample", logsnr, sigma_data)

    def target_weight(
        self, prediction_type: PredictionType, logsnr: Tensor, sigma_data: float
    ) -> Tensor:
        """w_F(λ) = w(λ) |∂x_0/∂F|², the weight of the squared error of F, of the shape of λ.

        Args:
            prediction_type: the network's target F.
            logsnr: λ, of any shape; ±inf gives the limit.
            sigma_data: standard deviation s of the data; only edm weights and targets depend on it.

        Returns:
            w_F: 0, finite, or inf. float64 on the host; on another device in the dtype of λ there,
            as for learned levels, whose gradient it has.
        """

        def log_weight(logsnr: Tensor) -> Tensor:
            return self.log(logsnr, sigma_data) + log_gain(prediction_type, logsnr, sigma_data)

        logsnr = logsnr.double() if logsnr.device.type == "cpu" else logsnr
        end = logsnr.sign() * FAR
        last = log_weight(end)
        slope = log_weight(end + logsnr.sign()) - last  # of ln w towards λ = ±inf
        limit = torch.where(slope.abs() < 1e-9, last, slope.sign() * math.inf)
        infinite = logsnr.isinf()
        return torch.where(infinite, limit, log_weight(logsnr.masked_fill(infinite, 0.0))).exp()


@dataclass(frozen=True)
class MSE(Weight):
    """w = 1 / |∂x_0/∂F|²: the squared error of a target F, which may differ from the network's.

        epsilon            SNR
        sample             1
        v_prediction       SNR + 1
        flow_prediction    (1 + √SNR)²
        edm                SNR + 1/s², the weight of EDM

    Args:
        target: quantity F whose squared error is the loss.

    Raises:
        ValueError: the target is unknown; the message lists the known ones.
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
    """w = SNR + 1/s² = (σ² + s²) / (σ s)², with σ the noise level σ/α of x/α.

    It is 1 on the output of the preconditioned network, and equal to MSE("edm").

    Source: Karras et al. 2022 (2206.00364, Table 1, λ(σ)).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -log_gain("edm", logsnr, sigma_data)


@dataclass(frozen=True)
class ELBO(Weight):
    """w = SNR / 2, which is ½ on the ε error.

    With `corrected` the loss is the diffusion term of the evidence lower bound, in nats per
    dimension:

        -½ ∫ |x_0 - x̂_0|² dSNR = ½ ∫ |ε - ε̂|² dλ

    It depends on the schedule only through its two ends.

    Source: Kingma et al. 2021 (2107.00630, eq. 18).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr - math.log(2)


@dataclass(frozen=True)
class MinSNR(Weight):
    """w = min(SNR, γ), which is min(1, γ/SNR) on ε and min(SNR, γ)/(SNR+1) on v.

    Source: Hang et al. 2023 (2303.09556, eq. 9).

    Args:
        gamma: upper bound γ > 0 of the weight.

    Raises:
        ValueError: γ is not positive and finite.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr.clamp(max=math.log(self.gamma))


@dataclass(frozen=True)
class SoftMinSNR(Weight):
    """w = SNR γ / (SNR + γ), a smooth minimum of SNR and γ.

    Source: Crowson et al. 2024 (2401.11605), whose γ = 4 is 1/s² at s = ½.

    Args:
        gamma: limit γ > 0 of the weight at infinite SNR.

    Raises:
        ValueError: γ is not positive and finite.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        bound = math.log(self.gamma)
        return bound + logsigmoid(logsnr - bound)


@dataclass(frozen=True)
class SigmoidWeight(Weight):
    """w = SNR sigmoid(b - λ), VDM++'s monotone weight sigmoid(b - λ) on the ε error.

    It is equal to SoftMinSNR(e^b). The source weights an integral over λ, which needs `corrected`.

    Source: Kingma & Gao 2023 (2303.00848, section 5).

    Args:
        bias: λ at which the sigmoid is ½, a finite number b.

    Raises:
        ValueError: b is not finite.
    """

    bias: float = 2.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"bias is {self.bias}, expected a finite λ")

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr + logsigmoid(self.bias - logsnr)


@dataclass(frozen=True)
class TruncatedSNR(Weight):
    """w = max(SNR, minimum): the ε loss with a weight of x_0 that does not vanish at pure noise.

    Source: Salimans & Ho 2022 (2202.00512, section 4, "truncated SNR", minimum = 1).

    Args:
        minimum: lower bound of the weight, positive.

    Raises:
        ValueError: the minimum is not positive and finite.
    """

    minimum: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("minimum", self.minimum)

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr.clamp(min=math.log(self.minimum))


@dataclass(frozen=True)
class P2(Weight):
    """w = SNR / (k + SNR)^γ, which is 1/(k + SNR)^γ on the ε error.

    Source: Choi et al. 2022 (2204.00227, eq. 8).

    Args:
        k: offset of the SNR, positive.
        gamma: exponent γ ≥ 0; 0 is the plain ε error.

    Raises:
        ValueError: k is not positive, or γ is negative or not finite.
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
    """w = √SNR, which is 1/√SNR on the ε error and √SNR/(SNR+1) on v.

    Source: Yu et al. 2023 (2310.08442, eq. 14).
    """

    def log(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return logsnr / 2


def _check_positive(name: str, value: float) -> None:
    """Raise ValueError if a parameter is not positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")
