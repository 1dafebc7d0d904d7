"""Transforms of schedules: schedule in, schedule out, with exact λ(t), inverse and density."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffcore.schedules.base import Level, Scaling, Schedule


@dataclass(frozen=True)
class Transform(Schedule):
    """A schedule made from another; its scaling and its number of levels are the inner one's."""

    schedule: Schedule

    @property
    def scaling(self) -> Scaling:  # type: ignore[override]  # a field elsewhere
        return self.schedule.scaling

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return self.schedule.steps


@dataclass(frozen=True)
class Shifted(Transform):
    """λ'(t) = λ(t) + shift.

    Chen's input scale b is shift = 2 ln b (2301.10972); simple diffusion's resolution is 2 ln(d₀/d) (2301.11093); the
    time shift s of SD3 and Flux is -2 ln s (2403.03206, section 5.3.2).

    Args:
        schedule: the schedule to shift.
        shift: in λ; negative is noisier.
    """

    shift: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(f"shift is {self.shift}, expected a finite number in units of λ = log α²/σ²")

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.schedule.logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.schedule.time(logsnr - self.shift)

    def _density(self, logsnr: Tensor) -> Tensor:
        return self.schedule.density(logsnr - self.shift)


@dataclass(frozen=True)
class Truncated(Transform):
    """λ restricted to [low, high]: p'(λ) = p(λ) / (t(low) - t(high)) there, t' = (t - t(high)) / (t(low) - t(high)).

    Every t in (0, 1) is drawn, also of a table.

    Args:
        schedule: the schedule to restrict.
        low: the noisiest level, λ'(1).
        high: the cleanest level, λ'(0).
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low and high are {self.low} and {self.high}, expected λ with low < high")
        if not self._start < self._end:
            raise ValueError(f"{self.schedule} has no levels between λ = {self.low} and {self.high}")

    @property
    def steps(self) -> None:  # type: ignore[override]
        """None: it is no table any more."""

    @cached_property
    def _start(self) -> float:
        return self.schedule.time(self.high)

    @cached_property
    def _end(self) -> float:
        return self.schedule.time(self.low)

    def _logsnr(self, t: Tensor) -> Tensor:
        inside = self.schedule.logsnr(torch.lerp(t.new_tensor(self._start), t.new_tensor(self._end), t))
        return inside.clamp(self.low, self.high)

    def _time(self, logsnr: Tensor) -> Tensor:
        return ((self.schedule.time(logsnr) - self._start) / (self._end - self._start)).clamp(0, 1)

    def _density(self, logsnr: Tensor) -> Tensor:
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        return self.schedule.density(logsnr).masked_fill(~inside, 0.0) / (self._end - self._start)


@dataclass(frozen=True)
class ZeroTerminalSNR(Transform):
    """α' = (α - α_T) α_0 / (α_0 - α_T) in the vp scaling, so that λ'(1) = -inf and the cleanest level is kept.

    Lin et al. 2023 (2305.08891, Algorithm 1). α_0 is the first entry of a table (levels cleaner than it are left as they
    are), or α(0) of a continuous schedule, which this transforms in the same way.

    Args:
        schedule: any schedule; one that ends at λ = -inf already is unchanged.
    """

    schedule: Schedule

    @cached_property
    def _ends(self) -> tuple[Level, Level]:
        """The levels that the algorithm keeps (α_0) and sends to zero (α_T), in vp terms."""
        first = 0.0 if self.steps is None else 1 / self.steps
        return self.schedule.level(first), self.schedule.level(1.0)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α_0, 1 - α_0, α_T and the slope c = dα/dα' = (α_0 - α_T) / α_0."""
        logsnr = torch.tensor([level.logsnr for level in self._ends], dtype=torch.float64)
        (alpha_0, alpha_t), (rest_0, _) = _alpha(logsnr)
        return alpha_0, rest_0, alpha_t, (alpha_0 - alpha_t) / alpha_0

    def _logsnr(self, t: Tensor) -> Tensor:
        logsnr = self.schedule.logsnr(t)
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        scaled = _from_alpha((alpha - alpha_t) / c, (rest - rest_0 * alpha_t / alpha_0) / c)
        return torch.where(self._cleaner(logsnr), logsnr, torch.where(t == 1, -torch.inf, scaled))

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.where(logsnr == -torch.inf, 1.0, self.schedule.time(self._inner(logsnr)))

    def _density(self, logsnr: Tensor) -> Tensor:
        inner, c = self._inner(logsnr), self._constants[-1]
        slope = c * _alpha_rate(logsnr) / _alpha_rate(inner)  # dλ/dλ'
        density = self.schedule.density(inner) * torch.where(self._cleaner(logsnr), 1.0, slope)
        return density.masked_fill(logsnr == -torch.inf, 0.0)

    def _inner(self, logsnr: Tensor) -> Tensor:
        """λ of the inner schedule from λ'."""
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        inner = _from_alpha(alpha * c + alpha_t, rest * c + rest_0 * alpha_t / alpha_0)
        return torch.where(self._cleaner(logsnr), logsnr, inner)

    def _cleaner(self, logsnr: Tensor) -> Tensor:
        return logsnr >= self._ends[0].logsnr


def _alpha(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """α = √sigmoid(λ) and 1 - α = σ² / (1 + α), without cancellation."""
    alpha = logsnr.sigmoid().sqrt()
    return alpha, (-logsnr).sigmoid() / (1 + alpha)


def _from_alpha(alpha: Tensor, rest: Tensor) -> Tensor:
    """λ from α and 1 - α: ln α² - ln((1-α)(1+α))."""
    return 2 * alpha.log() - (rest * (1 + alpha)).log()


def _alpha_rate(logsnr: Tensor) -> Tensor:
    """2 dα/dλ = α σ² in the vp scaling."""
    return logsnr.sigmoid().sqrt() * (-logsnr).sigmoid()
