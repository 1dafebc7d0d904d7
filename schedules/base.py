"""Noise schedules: x_t = α(t) x_0 + σ(t) ε for t in [0, 1], where t = 0 is data and t = 1 is noise.

    λ(t) = log α(t)² / σ(t)²        "logsnr", a natural logarithm; it decreases in t

Drawing t ~ U(0, 1) and evaluating λ(t) draws λ from the density p(λ) = -dt/dλ, so a schedule *is* a
distribution of noise levels: λ(t) is its quantile function at 1 - t. The scaling selects one of
three equivalent processes with that λ(t):

    vp     α² = sigmoid(λ),   σ² = sigmoid(-λ)        α² + σ² = 1
    flow   α = sigmoid(λ/2),  σ = sigmoid(-λ/2)       α + σ = 1
    ve     α = 1,             σ = exp(-λ/2)           not defined at λ = -inf

All values are computed on the host in float64, for any dtype of the input.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

__all__ = ["Level", "Real", "Scaling", "Schedule", "alpha_sigma", "check_scaling"]

Scaling = Literal["vp", "ve", "flow"]
Real = float | Tensor
R = TypeVar("R", bound=float | Tensor)
LEVEL_TOLERANCE = 1e-6
"""Rounding in λ that is allowed in the comparison with the cleanest level of training."""


def alpha_sigma(logsnr: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """α(λ) and σ(λ) of a scaling, exact to rounding from λ = -inf to +inf (never sqrt(1 - α²)).

    Args:
        logsnr: λ, any shape.
        scaling: vp, ve or flow.

    Returns:
        α and σ, each of the shape of `logsnr`.

    Raises:
        ValueError: The scaling is unknown.
    """
    match scaling:
        case "vp":
            return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        case "flow":
            return (logsnr / 2).sigmoid(), (-logsnr / 2).sigmoid()
        case "ve":
            return torch.ones_like(logsnr), (-logsnr / 2).exp()
    raise ValueError(_unknown(scaling))


def check_scaling(scaling: str) -> None:
    """Raise ValueError if `scaling` is not vp, ve or flow."""
    if scaling not in get_args(Scaling):
        raise ValueError(_unknown(scaling))


def _unknown(scaling: str) -> str:
    return f"scaling is {scaling!r}, expected one of {', '.join(get_args(Scaling))}"


@dataclass(frozen=True)
class Level:
    """One noise level of a schedule: x = α x_0 + σ ε at λ = `logsnr`, which is reached at time t.

    The values are Python floats when a whole batch is at one level (sampling), or float64 host
    tensors that broadcast against x: shape (B, 1, 1, 1) in training, the shape of x for a map of
    levels.

    Args:
        logsnr: λ = log α²/σ².
        t: time in [0, 1]; 0 is data, 1 is noise.
        alpha: α, the coefficient of x_0.
        sigma: σ, the coefficient of ε.
        schedule: schedule that the level belongs to; samplers compute further levels with it.
        end: level to which a network of two times follows the flow from here
            (`Process.estimate`); None where only this level matters.
    """

    logsnr: Real
    t: Real
    alpha: Real
    sigma: Real
    schedule: "Schedule" = field(repr=False)
    end: "Level | None" = field(default=None, repr=False)

    @property
    def blend(self) -> Real:
        """a = σ / (α + σ), the blending coordinate: 1 is noise, 0 is data."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def ratio(self) -> Real:
        """u = σ / α, the "sigma" of EDM and k-diffusion; inf at α = 0."""
        if isinstance(self.logsnr, Tensor):
            return (-self.logsnr / 2).exp()
        return math.exp(-self.logsnr / 2) if self.logsnr > -math.inf else math.inf

    @property
    def logsnr_range(self) -> tuple[float, float]:
        """The smallest and the largest λ, as Python floats; both are λ if the level is a float."""
        if isinstance(self.logsnr, Tensor):
            return float(self.logsnr.min()), float(self.logsnr.max())
        return self.logsnr, self.logsnr

    @property
    def is_beyond_training(self) -> bool:
        """Whether the level, or a part of a map, is cleaner than the levels of training."""
        return self.logsnr_range[1] > self.schedule.cleanest.logsnr_range[1] + LEVEL_TOLERANCE

    def to(self, x: Tensor) -> "Level":
        """Move the tensors of the level to the device and the dtype of `x`.

        Args:
            x: tensor whose device and dtype are used.

        Returns:
            The same level; Python floats stay as they are.
        """
        if not isinstance(self.logsnr, Tensor):
            return self
        logsnr, t, alpha, sigma = (
            value.to(x) if isinstance(value, Tensor) else value
            for value in (self.logsnr, self.t, self.alpha, self.sigma)
        )
        end = None if self.end is None else self.end.to(x)
        return Level(logsnr, t, alpha, sigma, self.schedule, end)


class Schedule(ABC):
    """A noise schedule x_t = α(t) x_0 + σ(t) ε.

    A subclass implements `_logsnr`, λ(t); `_time`, its exact inverse t(λ); and `_density`,
    p(λ) = -dt/dλ. Each maps a float64 host tensor to one of the same shape.

    Every public method maps a float to a float, and a tensor to a float64 tensor of the same shape
    on the host.

    Example:
        >>> from diffcore.schedules import Flow
        >>> level = Flow().level(0.25)
        >>> level.alpha, level.sigma
        (0.75, 0.25)
        >>> Flow().time(level.logsnr)
        0.25
    """

    scaling: Scaling
    steps: int | None = None
    """Number of entries of a table, entry i at t = (i + 1) / steps; None: a continuous schedule."""

    @abstractmethod
    def _logsnr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, logsnr: Tensor) -> Tensor: ...

    @abstractmethod
    def _density(self, logsnr: Tensor) -> Tensor: ...

    def logsnr(self, t: R) -> R:
        """λ(t) for t in [0, 1], in the shape of `t`. Raises ValueError outside [0, 1]."""
        return _on_host(self._logsnr_checked, t)

    def time(self, logsnr: R) -> R:
        """t(λ), the inverse of λ(t), in the shape of `logsnr`.

        Above the largest λ of the schedule the result is 0, below the smallest it is 1.
        """
        return _on_host(self._time, logsnr)

    def density(self, logsnr: R) -> R:
        """p(λ) = -dt/dλ, the density of λ(t) for t ~ U(0, 1), in the shape of `logsnr`."""
        return _on_host(self._density, logsnr)

    def cdf(self, logsnr: R) -> R:
        """P(λ(t) ≤ logsnr) = 1 - t(λ), in the shape of `logsnr`."""
        return _on_host(lambda logsnr: 1 - self._time(logsnr), logsnr)

    def quantile(self, u: R) -> R:
        """λ with cdf u, which is λ(1 - u), in the shape of `u`."""
        return _on_host(lambda u: self._logsnr_checked(1 - u), u)

    def training_times(self, u: Tensor) -> Tensor:
        """Map u ~ U(0, 1) to training times, in the shape of `u`.

        A continuous schedule returns u. A table returns the time of the next entry at or above u,
        so that each of its entries is drawn equally often.
        """
        return u if self.steps is None else (u * self.steps).ceil().clamp(min=1) / self.steps

    @cached_property
    def cleanest(self) -> Level:
        """The cleanest level of training: entry 0 of a table, t = 0 of a continuous schedule.

        It is finite on tables and on Truncated, LogLinear and Rho. No grid evaluates a network at
        a cleaner level, since λ(t) has none there: `time` is 0 for all of them, or below entry 0.
        """
        return self.level(0.0 if self.steps is None else 1 / self.steps)

    def level(self, t: Real) -> Level:
        """The level at time t, a number or a tensor of any shape."""
        return self._level(self.logsnr(t), _on_host(torch.clone, t))

    def at(self, logsnr: Real) -> Level:
        """The level at λ, a number or a tensor of any shape."""
        return self._level(_on_host(torch.clone, logsnr), self.time(logsnr))

    def at_blend(self, blend: Real) -> Level:
        """The level at a = σ/(α+σ), a number or a tensor of any shape: λ = 2 ln((1-a)/a)."""
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
    """function(value) in float64 on the host; a float becomes a float."""
    if isinstance(value, Tensor):
        return cast("R", function(value.to("cpu", torch.float64)))
    return cast("R", function(torch.tensor(value, dtype=torch.float64)).item())
