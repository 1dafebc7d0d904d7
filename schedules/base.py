"""Noise schedules: x_t = α(t) x_0 + σ(t) ε for t in [0, 1], where t = 0 is data and t = 1 is noise.

    λ(t) = log α(t)² / σ(t)²        "logsnr": natural log of the squared ratio, strictly falling in t

Drawing t ~ U(0, 1) and reading λ(t) draws λ from the density p(λ) = -dt/dλ, so a schedule *is* a distribution of noise
levels: λ(t) is its quantile function at 1 - t. A scaling says which of three equivalent processes carries it:

    vp     α² = sigmoid(λ),   σ² = sigmoid(-λ)        α² + σ² = 1
    flow   α = sigmoid(λ/2),  σ = sigmoid(-λ/2)       α + σ = 1
    ve     α = 1,             σ = exp(-λ/2)           unusable at λ = -inf

Everything here is computed on the host in float64, whatever the dtype of the input.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

Scaling = Literal["vp", "ve", "flow"]
Real = float | Tensor
R = TypeVar("R", bound=float | Tensor)


def alpha_sigma(logsnr: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """α(λ) and σ(λ) of a scaling, exact to rounding from λ = -inf to +inf (never sqrt(1 - α²))."""
    match scaling:
        case "vp":
            return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        case "flow":
            return (logsnr / 2).sigmoid(), (-logsnr / 2).sigmoid()
        case "ve":
            return torch.ones_like(logsnr), (-logsnr / 2).exp()
    raise ValueError(_unknown(scaling))


def check_scaling(scaling: str) -> None:
    """Raise where `scaling` is not one."""
    if scaling not in get_args(Scaling):
        raise ValueError(_unknown(scaling))


def _unknown(scaling: str) -> str:
    return f"scaling is {scaling!r}, expected one of {', '.join(get_args(Scaling))}"


@dataclass(frozen=True)
class Level:
    """One noise level: x = α x_0 + σ ε at λ = `logsnr`, where `schedule` has it at time t.

    The values are Python floats when a whole batch is at one level (sampling), or float64 host tensors that broadcast
    against x (training: shape (B, 1, 1, 1); a map of levels: the shape of x).
    """

    logsnr: Real
    t: Real
    alpha: Real
    sigma: Real
    schedule: "Schedule" = field(repr=False)

    @property
    def blend(self) -> Real:
        """A = σ / (α + σ), the blending coordinate: 1 is noise, 0 is data."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def ratio(self) -> Real:
        """U = σ / α, the "sigma" of EDM and k-diffusion; inf at α = 0."""
        if isinstance(self.logsnr, Tensor):
            return (-self.logsnr / 2).exp()
        return math.exp(-self.logsnr / 2) if self.logsnr > -math.inf else math.inf

    @property
    def logsnr_range(self) -> tuple[float, float]:
        """The noisiest and the cleanest λ of a map of levels, on the host; of one level, λ twice."""
        if isinstance(self.logsnr, Tensor):
            return float(self.logsnr.min()), float(self.logsnr.max())
        return self.logsnr, self.logsnr

    def to(self, x: Tensor) -> "Level":
        """The same level with its tensors cast to the device and dtype of x: the last thing before they meet x."""
        if not isinstance(self.logsnr, Tensor):
            return self
        logsnr, t, alpha, sigma = (
            value.to(x) if isinstance(value, Tensor) else value
            for value in (self.logsnr, self.t, self.alpha, self.sigma)
        )
        return Level(logsnr, t, alpha, sigma, self.schedule)


class Schedule(ABC):
    """x_t = α(t) x_0 + σ(t) ε. A subclass gives λ(t), its exact inverse t(λ) and the density p(λ) = -dt/dλ.

    Public methods take a float and return a float, or take a tensor and return a float64 tensor on the host.
    """

    scaling: Scaling
    steps: int | None = None
    """Number of levels of a table (time t = (i + 1) / steps is its entry i), None where every t in (0, 1) is meant."""

    @abstractmethod
    def _logsnr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, logsnr: Tensor) -> Tensor: ...

    @abstractmethod
    def _density(self, logsnr: Tensor) -> Tensor: ...

    def logsnr(self, t: R) -> R:
        """λ(t) for t in [0, 1]."""
        return _on_host(self._logsnr_checked, t)

    def time(self, logsnr: R) -> R:
        """t(λ), the inverse of λ(t); 0 above and 1 below the levels that the schedule has."""
        return _on_host(self._time, logsnr)

    def density(self, logsnr: R) -> R:
        """p(λ) = -dt/dλ, the density of λ(t) for t ~ U(0, 1)."""
        return _on_host(self._density, logsnr)

    def cdf(self, logsnr: R) -> R:
        """P(λ(t) ≤ logsnr) = 1 - t(λ)."""
        return _on_host(lambda logsnr: 1 - self._time(logsnr), logsnr)

    def quantile(self, u: R) -> R:
        """The level with cdf u: λ(1 - u)."""
        return _on_host(lambda u: self._logsnr_checked(1 - u), u)

    def training_times(self, u: Tensor) -> Tensor:
        """The times in training of u ~ U(0, 1): u itself, or with a table the next of its entries."""
        return u if self.steps is None else (u * self.steps).ceil().clamp(min=1) / self.steps

    def level(self, t: Real) -> Level:
        """The level at time t."""
        return self._level(self.logsnr(t), _on_host(torch.clone, t))

    def at(self, logsnr: Real) -> Level:
        """The level at log signal-to-noise ratio λ."""
        return self._level(_on_host(torch.clone, logsnr), self.time(logsnr))

    def at_blend(self, blend: Real) -> Level:
        """The level at a = σ/(α+σ): λ = 2 ln((1-a)/a)."""
        return self.at(_on_host(lambda a: -2 * a.logit(), blend))

    def _level(self, logsnr: Real, t: Real) -> Level:
        if isinstance(logsnr, Tensor):
            return Level(logsnr, t, *alpha_sigma(logsnr, self.scaling), schedule=self)
        alpha, sigma = alpha_sigma(torch.tensor(logsnr, dtype=torch.float64), self.scaling)
        return Level(logsnr, t, alpha.item(), sigma.item(), schedule=self)

    def _logsnr_checked(self, t: Tensor) -> Tensor:
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(
                f"t is {t.tolist()}, expected times within [0, 1] (0 is data, 1 is noise)"
            )
        return self._logsnr(t)


def _on_host(function: Callable[[Tensor], Tensor], value: R) -> R:
    """function(value) in float64 on the host; a float in, a float out."""
    if isinstance(value, Tensor):
        return cast("R", function(value.to("cpu", torch.float64)))
    return cast("R", function(torch.tensor(value, dtype=torch.float64)).item())
