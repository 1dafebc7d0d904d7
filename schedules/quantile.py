"""Schedules with a closed form: each is the quantile function λ(t) of a density p(λ), one class and one formula each.

t = 0 gives λ = +inf and t = 1 gives λ = -inf by rule, and both tails keep their digits: nothing subtracts from 1 a
number near 1 that was not given.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling, Schedule, check_scaling


@dataclass(frozen=True)
class Quantile(Schedule):
    """A schedule given by the quantile function of its density, in any of the three scalings."""

    scaling: Scaling = field(default="vp", kw_only=True)

    def __post_init__(self) -> None:
        check_scaling(self.scaling)


@dataclass(frozen=True)
class Cosine(Quantile):
    """λ(t) = 2 ln cot(πt/2), that is α = cos(πt/2), σ = sin(πt/2); p(λ) = sech(λ/2) / 2π.

    Nichol & Dhariwal 2021 (2102.09672) without its offset; the hyperbolic secant density is Kingma & Gao 2023.
    """

    def _logsnr(self, t: Tensor) -> Tensor:
        return torch.where(t <= 0.5, -_log_tan(t), _log_tan(1 - t))

    def _time(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).exp().atan() * (2 / math.pi)

    def _density(self, logsnr: Tensor) -> Tensor:
        return 1 / (2 * math.pi * (logsnr / 2).cosh())


@dataclass(frozen=True)
class Flow(Quantile):
    """λ(t) = 2 ln((1-t)/t), that is σ/(α+σ) = t: rectified flow and IADB; p(λ) is logistic of scale 2.

    Its own scaling is `flow`: x_t = (1-t) x_0 + t ε. Liu et al. 2022 (2209.03003), Heitz et al. 2023 (2305.03486).
    """

    scaling: Scaling = field(default="flow", kw_only=True)

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * t.logit()

    def _time(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).sigmoid()

    def _density(self, logsnr: Tensor) -> Tensor:
        return (logsnr / 2).sigmoid() * (-logsnr / 2).sigmoid() / 2


@dataclass(frozen=True)
class Laplace(Quantile):
    """λ(t) = μ - b sgn(½-t) ln(1 - 2|t-½|); p(λ) = exp(-|λ-μ|/b) / 2b.

    Hang & Gu 2024 (2407.03297): importance sampling of logSNR, μ = 0 and b = 0.5 at 256², b = 0.75 at 512².

    Args:
        mean: μ, the median level.
        scale: b > 0.
    """

    mean: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("mean", self.mean)
        _check_positive("scale", self.scale)

    def _logsnr(self, t: Tensor) -> Tensor:
        tail = torch.minimum(t, 1 - t)  # 1 - 2|t-½| = 2 min(t, 1-t), without the cancellation
        return self.mean - self.scale * (0.5 - t).sign() * (2 * tail).log()

    def _time(self, logsnr: Tensor) -> Tensor:
        z = (logsnr - self.mean) / self.scale
        tail = (-z.abs()).exp() / 2
        return torch.where(z >= 0, tail, 1 - tail)

    def _density(self, logsnr: Tensor) -> Tensor:
        return (-(logsnr - self.mean).abs() / self.scale).exp() / (2 * self.scale)


@dataclass(frozen=True)
class Normal(Quantile):
    """λ(t) = μ + s Φ⁻¹(1-t); p(λ) = N(μ, s²).

    ln(σ/α) ~ N(P, S²) is Normal(-2P, 2S): EDM is Normal(2.4, 2.4) for data of standard deviation 0.5. SD3's logit-normal
    time N(m, s²) is Normal(-2m, 2s). Karras et al. 2022 (2206.00364, Table 1), Esser et al. 2024 (2403.03206, section 3.1).

    Args:
        mean: μ of λ.
        std: s > 0 of λ.
    """

    mean: float = 0.0
    std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("mean", self.mean)
        _check_positive("std", self.std)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.mean - self.std * torch.special.ndtri(t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.special.erfc((logsnr - self.mean) / (self.std * math.sqrt(2))) / 2

    def _density(self, logsnr: Tensor) -> Tensor:
        z = (logsnr - self.mean) / self.std
        return (-(z**2) / 2).exp() / (self.std * math.sqrt(2 * math.pi))


def _log_tan(t: Tensor) -> Tensor:
    """2 ln tan(πt/2)."""
    return 2 * (t * (math.pi / 2)).tan().log()


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")
