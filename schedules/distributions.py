"""Schedules in closed form: each is the quantile function λ(t) of a density p(λ).

Unless a class states bounds, t = 0 is λ = +inf and t = 1 is λ = -inf. Both tails keep their digits,
because no formula subtracts from 1 a computed number near 1.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling, Schedule, check_scaling

__all__ = ["Cauchy", "Cosine", "Distribution", "Flow", "Laplace", "LogLinear", "Normal", "Rho"]


@dataclass(frozen=True)
class Distribution(Schedule):
    """Base class of the continuous schedules; each can be used in any of the three scalings.

    Args:
        scaling: vp, ve or flow.
    """

    scaling: Scaling = field(default="vp", kw_only=True)

    def __post_init__(self) -> None:
        check_scaling(self.scaling)


@dataclass(frozen=True)
class Cosine(Distribution):
    """λ(t) = μ + (2/s) ln cot(πt/2); by default α = cos(πt/2) and σ = sin(πt/2).

    p(λ) = s sech(s(λ-μ)/2) / 2π. Nichol & Dhariwal 2021 (2102.09672) without its offset; the
    hyperbolic secant density is Kingma & Gao 2023; shifted and scaled, Hang & Gu 2024 (2407.03297).

    Args:
        shift: μ, the median of λ.
        scale: s > 0; a larger value concentrates the levels around μ.
        scaling: vp, ve or flow.
    """

    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("shift", self.shift)
        _check_positive("scale", self.scale)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.shift + torch.where(t <= 0.5, -_log_tan(t), _log_tan(1 - t)) / self.scale

    def _time(self, logsnr: Tensor) -> Tensor:
        return (-self._z(logsnr) / 2).exp().atan() * (2 / math.pi)

    def _density(self, logsnr: Tensor) -> Tensor:
        return self.scale / (2 * math.pi * (self._z(logsnr) / 2).cosh())

    def _z(self, logsnr: Tensor) -> Tensor:
        return self.scale * (logsnr - self.shift)


@dataclass(frozen=True)
class Flow(Distribution):
    """λ(t) = 2 ln((1-t)/t), so that σ/(α+σ) = t: rectified flow and α-blending (IADB).

    p(λ) is logistic with scale 2. Liu et al. 2022 (2209.03003), Heitz et al. 2023 (2305.03486).

    Args:
        scaling: vp, ve or flow; the default, flow, is x_t = (1-t) x_0 + t ε.
    """

    scaling: Scaling = field(default="flow", kw_only=True)

    def _logsnr(self, t: Tensor) -> Tensor:
        return -2 * t.logit()

    def _time(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).sigmoid()

    def _density(self, logsnr: Tensor) -> Tensor:
        return (logsnr / 2).sigmoid() * (-logsnr / 2).sigmoid() / 2


@dataclass(frozen=True)
class Laplace(Distribution):
    """λ(t) = μ - b sgn(½-t) ln(1 - 2|t-½|); p(λ) = exp(-|λ-μ|/b) / 2b.

    Hang & Gu 2024 (2407.03297), importance sampling of logSNR: μ = 0, b = 0.5 for 256² pixels and
    0.75 for 512².

    Args:
        mean: μ, the mean and median of λ.
        scale: b > 0; the standard deviation of λ is √2 b.
        scaling: vp, ve or flow.
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
class Normal(Distribution):
    """λ(t) = μ + s Φ⁻¹(1-t); p(λ) = N(μ, s²).

    A log-normal σ/α and a logit-normal σ/(α+σ) both have a normal λ; `edm` and `logit_normal` build
    the schedule from their parameters.

    Args:
        mean: μ, the mean of λ.
        std: s > 0, the standard deviation of λ.
        scaling: vp, ve or flow.
    """

    mean: float = 0.0
    std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("mean", self.mean)
        _check_positive("std", self.std)

    @classmethod
    def edm(cls, P_mean: float = -1.2, P_std: float = 1.2) -> "Normal":
        """Build the schedule with ln(σ/α) ~ N(P, S²), which is λ ~ N(-2P, (2S)²).

        Karras et al. 2022 (2206.00364, Table 1: -1.2, 1.2), EDM2 (2312.02696: -0.4, 1.0 on 512²
        latents; -0.8, 1.6 on 64²).

        Args:
            P_mean: P for data of standard deviation 0.5; for standard deviation s add ln 2s.
            P_std: S > 0.

        Returns:
            The schedule in the ve scaling.
        """
        return cls(-2 * P_mean, 2 * P_std, scaling="ve")

    @classmethod
    def logit_normal(cls, mean: float = 0.0, std: float = 1.0) -> "Normal":
        """Build the schedule with logit(σ/(α+σ)) ~ N(m, s²), which is λ ~ N(-2m, (2s)²).

        Esser et al. 2024 (2403.03206, eq. 19).

        Args:
            mean: m; a larger value draws noisier levels.
            std: s > 0.

        Returns:
            The schedule in the flow scaling.
        """
        return cls(-2 * mean, 2 * std, scaling="flow")

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.mean - self.std * torch.special.ndtri(t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.special.erfc((logsnr - self.mean) / (self.std * math.sqrt(2))) / 2

    def _density(self, logsnr: Tensor) -> Tensor:
        z = (logsnr - self.mean) / self.std
        return (-(z**2) / 2).exp() / (self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Cauchy(Distribution):
    """λ(t) = μ + γ tan(π(½-t)); p(λ) = γ / π((λ-μ)² + γ²). Hang & Gu 2024 (2407.03297).

    Args:
        mean: μ, the median of λ (the distribution has no mean).
        scale: γ > 0, half of the interquartile range of λ.
        scaling: vp, ve or flow.
    """

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("mean", self.mean)
        _check_positive("scale", self.scale)

    def _logsnr(self, t: Tensor) -> Tensor:
        tail = torch.minimum(t, 1 - t)  # tan(π(½-t)) = ±cot(π min(t, 1-t)), inf at 0
        return self.mean + self.scale * (0.5 - t).sign() / (math.pi * tail).tan()

    def _time(self, logsnr: Tensor) -> Tensor:
        z = (logsnr - self.mean) / self.scale
        tail = z.abs().reciprocal().atan() / math.pi
        return torch.where(z >= 0, tail, 1 - tail)

    def _density(self, logsnr: Tensor) -> Tensor:
        z = (logsnr - self.mean) / self.scale
        return 1 / (math.pi * self.scale * (1 + z**2))


@dataclass(frozen=True)
class LogLinear(Distribution):
    """λ(t) = λ_max + t (λ_min - λ_max): ln(σ/α) is linear in t, p(λ) is uniform.

    The fixed schedule of VDM (Kingma et al. 2021, 2107.00630: -γ from 13.3 to -5); `ve` is the
    variance-exploding schedule of Song et al. 2021.

    Args:
        low: λ_min, λ of the noisiest level, at t = 1; finite.
        high: λ_max, λ of the cleanest level, at t = 0; finite.
        scaling: vp, ve or flow.
    """

    low: float = -5.0
    high: float = 13.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected finite λ with low < high"
            )

    @classmethod
    def ve(cls, sigma_min: float = 0.01, sigma_max: float = 50.0) -> "LogLinear":
        """Build the schedule σ(t) = σ_min (σ_max/σ_min)^t. Song et al. 2021 (2011.13456).

        Args:
            sigma_min: σ at t = 0, above 0.
            sigma_max: σ at t = 1, finite; about the largest distance between two data points.

        Returns:
            The schedule in the ve scaling.
        """
        _check_sigmas(sigma_min, sigma_max)
        return cls(-2 * math.log(sigma_max), -2 * math.log(sigma_min), scaling="ve")

    def _logsnr(self, t: Tensor) -> Tensor:
        return torch.lerp(t.new_tensor(self.high), t.new_tensor(self.low), t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return ((self.high - logsnr) / (self.high - self.low)).clamp(0, 1)

    def _density(self, logsnr: Tensor) -> Tensor:
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        return inside.double() / (self.high - self.low)


@dataclass(frozen=True)
class Rho(Distribution):
    """u(t)^(1/ρ) = u_min^(1/ρ) + t (u_max^(1/ρ) - u_min^(1/ρ)), u = σ/α = e^(-λ/2).

    The grid `Karras` as a continuous schedule; p(λ) = u^(1/ρ) / 2ρ(u_max^(1/ρ) - u_min^(1/ρ))
    between the bounds. Karras et al. 2022 (2206.00364, eq. 5).

    Args:
        sigma_min: u_min > 0, σ/α at t = 0; the default is for data of standard deviation 0.5.
        sigma_max: u_max, σ/α at t = 1, finite; the default is for the same data.
        rho: ρ > 0; a larger value draws more levels near the data, and ρ → ∞ is LogLinear.
        scaling: vp, ve or flow.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    scaling: Scaling = field(default="ve", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sigmas(self.sigma_min, self.sigma_max)
        _check_positive("rho", self.rho)

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _logsnr(self, t: Tensor) -> Tensor:
        low, high = self._roots
        return -2 * self.rho * torch.lerp(t.new_tensor(low), t.new_tensor(high), t).log()

    def _time(self, logsnr: Tensor) -> Tensor:
        low, high = self._roots
        return (((-logsnr / (2 * self.rho)).exp() - low) / (high - low)).clamp(0, 1)

    def _density(self, logsnr: Tensor) -> Tensor:
        low, high = self._roots
        root = (-logsnr / (2 * self.rho)).exp()
        inside = (root >= low) & (root <= high)
        return (root / (2 * self.rho * (high - low))).masked_fill(~inside, 0.0)


def _log_tan(t: Tensor) -> Tensor:
    """2 ln tan(πt/2)."""
    return 2 * (t * (math.pi / 2)).tan().log()


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min and sigma_max are {sigma_min} and {sigma_max}, expected "
            "0 < sigma_min < sigma_max < inf"
        )
