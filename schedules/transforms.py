"""Transforms of schedules: schedule in, schedule out, with exact λ(t), inverse and density."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffcore.schedules.base import Level, Scaling, Schedule, check_scaling
from diffcore.schedules.distributions import LogLinear
from diffcore.schedules.roots import logit_time, newton

__all__ = [
    "Interpolated",
    "Mixture",
    "Rescaled",
    "ScheduleWrapper",
    "Shifted",
    "Truncated",
    "ZeroTerminalSNR",
]

FARTHEST = 1e300  # |λ| of the bounds of a bracket, which must be finite


@dataclass(frozen=True)
class ScheduleWrapper(Schedule):
    """A schedule made from an inner one, with its scaling and its number of levels.

    Args:
        inner: schedule that is transformed.
    """

    inner: Schedule

    @property
    def scaling(self) -> Scaling:  # type: ignore[override]  # a field elsewhere
        return self.inner.scaling

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return self.inner.steps


@dataclass(frozen=True)
class Shifted(ScheduleWrapper):
    """λ'(t) = λ(t) + shift.

    An input scale, a resolution shift and a time shift all are this transform; each has a
    constructor.

    Args:
        inner: schedule to shift.
        shift: constant added to λ; a negative value is noisier.
    """

    shift: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(
                f"shift is {self.shift}, expected a finite number in units of λ = log α²/σ²"
            )

    @classmethod
    def by_input_scale(cls, schedule: Schedule, b: float) -> "Shifted":
        """The schedule whose α²/σ² is multiplied by b², a shift of 2 ln b.

        Chen 2023 (2301.10972; the network input is normalised afterwards).
        """
        return cls(schedule, 2 * _log("b", b))

    @classmethod
    def by_resolution(cls, schedule: Schedule, size: float, reference: float = 64) -> "Shifted":
        """The schedule for images of another size: a shift of 2 ln(d₀/d).

        Hoogeboom et al. 2023 (2301.11093).

        Args:
            schedule: schedule for images of the reference size.
            size: d, side of the images in pixels.
            reference: d₀, side in pixels for which `schedule` was made.

        Returns:
            The shifted schedule.
        """
        return cls(schedule, 2 * (_log("reference", reference) - _log("size", size)))

    @classmethod
    def by_time_shift(cls, schedule: Schedule, s: float) -> "Shifted":
        """The schedule whose σ/(α+σ) is s a / (1 + (s-1) a) in place of a, a shift of -2 ln s.

        Esser et al. 2024
        (2403.03206, eq. 23); Flux: e^μ.
        """
        return cls(schedule, -2 * _log("s", s))

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.inner.logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.inner.time(logsnr - self.shift)

    def _density(self, logsnr: Tensor) -> Tensor:
        return self.inner.density(logsnr - self.shift)


@dataclass(frozen=True)
class Interpolated(ScheduleWrapper):
    """λ'(t) = λ(t) + (1-t) clean + t noise: a shift that changes from the clean end to the noisy
    one.

    The interpolated resolution shift of simple diffusion (`by_resolution`): fine detail receives
    the noise of a low resolution, layout that of a high one. Hoogeboom et al. 2023 (2301.11093).

    Args:
        inner: schedule to shift; it is steeper everywhere than the shift (Cosine: noise - clean <
            2π).
        clean: shift of λ at t = 0.
        noise: shift of λ at t = 1.
    """

    clean: float
    noise: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clean) and math.isfinite(self.noise)):
            raise ValueError(
                f"clean and noise are {self.clean} and {self.noise}, expected finite shifts of λ"
            )
        if not self._gentle:
            raise ValueError(
                f"the shift rises by {self.noise - self.clean:g} from t = 0 to 1, faster than λ(t) "
                f"of {self.inner} falls "
                f"somewhere, so that λ(t) would not be monotone: bring clean and noise closer"
            )

    @classmethod
    def by_resolution(
        cls, schedule: Schedule, size: float, low: float, high: float
    ) -> "Interpolated":
        """The schedule for images of one size with the shifts of two others.

        Args:
            schedule: schedule to shift.
            size: side of the images in pixels.
            low: side in pixels whose shift applies at the clean end.
            high: side in pixels whose shift applies at the noisy end.

        Returns:
            The shifted schedule.
        """
        d = _log("size", size)
        return cls(schedule, 2 * (_log("low", low) - d), 2 * (_log("high", high) - d))

    @property
    def _gentle(self) -> bool:
        """True if λ' decreases wherever it is sampled: -dλ/dt = 1/p is smallest where p is largest."""
        t = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        densest = self.inner.density(self.inner.logsnr(t)).max()
        return bool((self.noise - self.clean) * densest < 1)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.inner.logsnr(t) + torch.lerp(
            t.new_tensor(self.clean), t.new_tensor(self.noise), t
        )

    def _time(self, logsnr: Tensor) -> Tensor:
        return logit_time(
            lambda t, rest: self.inner.logsnr(t) + rest * self.clean + t * self.noise, logsnr
        )

    def _density(self, logsnr: Tensor) -> Tensor:
        inner = self.inner.density(self.inner.logsnr(self._time(logsnr)))
        beyond = logsnr < self.inner.logsnr(1.0) + self.noise
        return (inner / (1 - (self.noise - self.clean) * inner)).masked_fill(beyond, 0.0)


@dataclass(frozen=True)
class Mixture(Schedule):
    """p'(λ) = (1-f) p(λ) + f p_floor(λ), so that t'(λ) = (1-f) t(λ) + f t_floor(λ), whose inverse
    lies between theirs.

    A floor under an importance distribution: every level of the floor is trained, and the
    importance-corrected weight w/p stays bounded there.

    Args:
        inner: distribution with the share 1 - f; its scaling is kept.
        floor: distribution with the share f; default: uniform in λ from -10 to 10.
        share: f within (0, 1).
    """

    inner: Schedule
    floor: Schedule = field(default_factory=lambda: LogLinear(-10.0, 10.0))
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, expected within (0, 1)")

    @property
    def scaling(self) -> Scaling:  # type: ignore[override]
        return self.inner.scaling

    def _mixed(self, of_schedule: Tensor, of_floor: Tensor) -> Tensor:
        return (1 - self.share) * of_schedule + self.share * of_floor

    @cached_property
    def _knots(self) -> tuple[Tensor, Tensor]:
        """Decreasing levels of both parts from inf to -inf, dense wherever either has mass, and
        their times.
        """
        t = torch.linspace(-35, 35, 1001, dtype=torch.float64).sigmoid()
        logsnr = (
            torch.cat((self.inner.logsnr(t), self.floor.logsnr(t))).sort(descending=True).values
        )
        ends = logsnr.new_tensor([torch.inf])
        return torch.cat((ends, logsnr, -ends)), self._time(logsnr)

    def _logsnr(self, t: Tensor) -> Tensor:
        one, other = self.inner.logsnr(t), self.floor.logsnr(t)
        noisy, clean = torch.minimum(one, other), torch.maximum(one, other)
        knots, times = self._knots
        i = torch.searchsorted(times, t.contiguous())
        low = torch.maximum(noisy, knots[i + 1]).clamp(-FARTHEST, FARTHEST)
        high = torch.minimum(clean, knots[i]).clamp(-FARTHEST, FARTHEST)
        inside = newton(self._time, self._density, t, low, high)
        return torch.where(t == 0, clean, torch.where(t == 1, noisy, inside))

    def _time(self, logsnr: Tensor) -> Tensor:
        return self._mixed(self.inner.time(logsnr), self.floor.time(logsnr))

    def _density(self, logsnr: Tensor) -> Tensor:
        return self._mixed(self.inner.density(logsnr), self.floor.density(logsnr))


@dataclass(frozen=True)
class Rescaled(Schedule):
    """The same λ(t) in another scaling.

    Args:
        inner: schedule whose λ(t) is kept.
        scaling: vp, ve or flow.
    """

    inner: Schedule
    scaling: Scaling

    def __post_init__(self) -> None:
        check_scaling(self.scaling)

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return self.inner.steps

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.inner.logsnr(t)

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.inner.time(logsnr)

    def _density(self, logsnr: Tensor) -> Tensor:
        return self.inner.density(logsnr)


@dataclass(frozen=True)
class Truncated(ScheduleWrapper):
    """λ restricted to [low, high]: p'(λ) = p(λ) / (t(low) - t(high)) there, t' = (t - t(high)) /
    (t(low) - t(high)).

    Every t in (0, 1) is drawn, also if the inner schedule is a table.

    Args:
        inner: schedule to restrict.
        low: the noisiest level, λ'(1).
        high: the cleanest level, λ'(0).
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected λ with low < high"
            )
        if not self._end - self._start > 1e-9 * self._end:  # t near 1 is known to 1e-16
            raise ValueError(
                f"{self.inner} has almost no levels between λ = {self.low} and {self.high}: "
                "widen the bounds, or shift the schedule between them"
            )

    @property
    def steps(self) -> None:  # type: ignore[override]
        """None, because the levels are continuous."""

    @cached_property
    def _start(self) -> float:
        return self.inner.time(self.high)

    @cached_property
    def _end(self) -> float:
        return self.inner.time(self.low)

    def _logsnr(self, t: Tensor) -> Tensor:
        inside = self.inner.logsnr(
            torch.lerp(t.new_tensor(self._start), t.new_tensor(self._end), t)
        )
        return inside.clamp(self.low, self.high)

    def _time(self, logsnr: Tensor) -> Tensor:
        return ((self.inner.time(logsnr) - self._start) / (self._end - self._start)).clamp(0, 1)

    def _density(self, logsnr: Tensor) -> Tensor:
        inside = (logsnr >= self.low) & (logsnr <= self.high)
        return self.inner.density(logsnr).masked_fill(~inside, 0.0) / (self._end - self._start)


@dataclass(frozen=True)
class ZeroTerminalSNR(ScheduleWrapper):
    """α' = (α - α_T) α_0 / (α_0 - α_T) in the vp scaling, so that λ'(1) = -inf and the cleanest
    level is kept.

    Lin et al. 2023 (2305.08891, Algorithm 1). α_0 is the first entry of a table (levels cleaner
    than it are left as they are), or α(0) of a continuous schedule, which this transforms in the
    same way.

    Args:
        inner: any schedule; one that ends at λ = -inf is unchanged.
    """

    inner: Schedule

    @cached_property
    def _ends(self) -> tuple[Level, Level]:
        """The level that the algorithm keeps (α_0) and the level that it maps to α = 0 (α_T)."""
        first = 0.0 if self.steps is None else 1 / self.steps
        return self.inner.level(first), self.inner.level(1.0)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α_0, 1 - α_0, α_T and the slope c = dα/dα' = (α_0 - α_T) / α_0."""
        logsnr = torch.tensor([level.logsnr for level in self._ends], dtype=torch.float64)
        (alpha_0, alpha_t), (rest_0, _) = _alpha(logsnr)
        return alpha_0, rest_0, alpha_t, (alpha_0 - alpha_t) / alpha_0

    def _logsnr(self, t: Tensor) -> Tensor:
        logsnr = self.inner.logsnr(t)
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        scaled = _from_alpha((alpha - alpha_t) / c, (rest - rest_0 * alpha_t / alpha_0) / c)
        return torch.where(self._cleaner(logsnr), logsnr, torch.where(t == 1, -torch.inf, scaled))

    def _time(self, logsnr: Tensor) -> Tensor:
        return torch.where(logsnr == -torch.inf, 1.0, self.inner.time(self._inner(logsnr)))

    def _density(self, logsnr: Tensor) -> Tensor:
        inner, c = self._inner(logsnr), self._constants[-1]
        slope = c * _alpha_rate(logsnr) / _alpha_rate(inner)  # dλ/dλ'
        density = self.inner.density(inner) * torch.where(self._cleaner(logsnr), 1.0, slope)
        return density.masked_fill(logsnr == -torch.inf, 0.0)

    def _inner(self, logsnr: Tensor) -> Tensor:
        """λ of the inner schedule from λ'."""
        alpha_0, rest_0, alpha_t, c = self._constants
        alpha, rest = _alpha(logsnr)
        inner = _from_alpha(alpha * c + alpha_t, rest * c + rest_0 * alpha_t / alpha_0)
        return torch.where(self._cleaner(logsnr), logsnr, inner)

    def _cleaner(self, logsnr: Tensor) -> Tensor:
        return logsnr >= self._ends[0].logsnr


def _log(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")
    return math.log(value)


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
