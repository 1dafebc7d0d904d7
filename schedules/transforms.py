"""Transforms of schedules: each is a schedule with exact λ(t), inverse and density."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffcore.schedules.base import Scaling, Schedule, check_scaling
from diffcore.schedules.distributions import LogLinear
from diffcore.schedules.roots import invert_by_newton, invert_in_logit_time

__all__ = [
    "Interpolated",
    "Mixture",
    "Rescaled",
    "ScheduleWrapper",
    "Shifted",
    "Truncated",
]

LOGSNR_BOUND = 1e300  # |λ| of the bounds of a bracket, which must be finite


@dataclass(frozen=True)
class ScheduleWrapper(Schedule):
    """Base class of the schedules that keep the scaling and the number of levels of an inner one.

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

    An input scale, a resolution shift and a time shift are all this transform; each has a
    constructor.

    Args:
        inner: schedule to shift.
        shift: constant added to λ, finite; a negative value is noisier.
    """

    shift: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(
                f"shift is {self.shift}, expected a finite number in units of λ = log α²/σ²"
            )

    @classmethod
    def by_input_scale(cls, schedule: Schedule, b: float) -> "Shifted":
        """Multiply α²/σ² by b², a shift of 2 ln b.

        Chen 2023 (2301.10972; the network input is normalised afterwards).

        Args:
            schedule: schedule to shift.
            b: scale of x_0, above 0; below 1 is noisier.

        Returns:
            The shifted schedule.
        """
        return cls(schedule, 2 * _log_positive("b", b))

    @classmethod
    def by_resolution(cls, schedule: Schedule, size: float, reference: float = 64) -> "Shifted":
        """Adapt a schedule to images of another size, a shift of 2 ln(d₀/d).

        Hoogeboom et al. 2023 (2301.11093).

        Args:
            schedule: schedule for images of the reference size.
            size: d, side of the images in pixels.
            reference: d₀, side in pixels of the images for which `schedule` is suitable.

        Returns:
            The shifted schedule.

        Example:
            >>> from diffcore.schedules import Cosine
            >>> round(Shifted.by_resolution(Cosine(), 256).logsnr(0.5), 4)
            -2.7726
        """
        return cls(
            schedule, 2 * (_log_positive("reference", reference) - _log_positive("size", size))
        )

    @classmethod
    def by_time_shift(cls, schedule: Schedule, s: float) -> "Shifted":
        """Replace a = σ/(α+σ) by s a / (1 + (s-1) a), a shift of -2 ln s.

        Esser et al. 2024 (2403.03206, eq. 23).

        Args:
            schedule: schedule to shift.
            s: time shift, above 0; above 1 is noisier. SD3 uses 3, Flux e^μ.

        Returns:
            The shifted schedule.
        """
        return cls(schedule, -2 * _log_positive("s", s))

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.inner.logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.inner.time(logsnr - self.shift)

    def _density(self, logsnr: Tensor) -> Tensor:
        return self.inner.density(logsnr - self.shift)


@dataclass(frozen=True)
class Interpolated(ScheduleWrapper):
    """λ'(t) = λ(t) + (1-t) clean + t noise: a shift that is interpolated in t.

    `by_resolution` is the interpolated resolution shift of simple diffusion. Hoogeboom et al. 2023
    (2301.11093).

    Args:
        inner: schedule to shift; λ(t) must decrease faster than the shift increases, for any t
            (Cosine: noise - clean < 2π).
        clean: shift of λ at t = 0, finite.
        noise: shift of λ at t = 1, finite.

    Raises:
        ValueError: λ' would not be monotone; bring `clean` and `noise` closer.
    """

    clean: float
    noise: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clean) and math.isfinite(self.noise)):
            raise ValueError(
                f"clean and noise are {self.clean} and {self.noise}, expected finite shifts of λ"
            )
        if not self._is_monotone:
            raise ValueError(
                f"the shift increases by {self.noise - self.clean:g} from t = 0 to 1, faster than "
                f"λ(t) of {self.inner} decreases at some t, so that λ(t) would not be monotone: "
                "bring clean and noise closer"
            )

    @classmethod
    def by_resolution(
        cls, schedule: Schedule, size: float, low: float, high: float
    ) -> "Interpolated":
        """λ'(t) = t λ_low(t) + (1-t) λ_high(t), with λ_d the schedule shifted by 2 ln(d/size).

        Hoogeboom et al. 2023 (2301.11093): layout receives the noise of a schedule for images of
        the size `low`, which destroys it, and fine detail keeps more signal, as at the size `high`.

        Args:
            schedule: schedule to shift.
            size: side of the images in pixels.
            low: side in pixels whose shift applies at the noisy end; the paper has 32.
            high: side in pixels whose shift applies at the clean end; the paper has the size.

        Returns:
            The shifted schedule.

        Example:
            >>> from diffcore.schedules import Cosine
            >>> schedule = Interpolated.by_resolution(Cosine(), size=256, low=32, high=256)
            >>> schedule.clean, round(schedule.noise, 4)
            (0.0, -4.1589)
        """
        d = _log_positive("size", size)
        low_shift, high_shift = (
            2 * (_log_positive("low", low) - d),
            2 * (_log_positive("high", high) - d),
        )
        return cls(schedule, clean=high_shift, noise=low_shift)

    @property
    def _is_monotone(self) -> bool:
        """True if λ' decreases at 4096 times: -dλ/dt = 1/p is smallest where p is largest."""
        t = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        densest = self.inner.density(self.inner.logsnr(t)).max()
        return bool((self.noise - self.clean) * densest < 1)

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.inner.logsnr(t) + torch.lerp(
            t.new_tensor(self.clean), t.new_tensor(self.noise), t
        )

    def _time(self, logsnr: Tensor) -> Tensor:
        return invert_in_logit_time(
            lambda t, rest: self.inner.logsnr(t) + rest * self.clean + t * self.noise, logsnr
        )

    def _density(self, logsnr: Tensor) -> Tensor:
        inner = self.inner.density(self.inner.logsnr(self._time(logsnr)))
        beyond = logsnr < self.inner.logsnr(1.0) + self.noise
        beyond |= logsnr > self.inner.logsnr(0.0) + self.clean
        return (inner / (1 - (self.noise - self.clean) * inner)).masked_fill(beyond, 0.0)


@dataclass(frozen=True)
class Mixture(Schedule):
    """p'(λ) = (1-f) p(λ) + f p_floor(λ), so that t'(λ) = (1-f) t(λ) + f t_floor(λ).

    λ'(t) is between the λ(t) of the two parts. A floor below an importance distribution ensures
    that each of its levels is trained, and bounds the importance-corrected weight w/p there.

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
        """Levels from inf to -inf, dense where either part has mass, and their times."""
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
        low = torch.maximum(noisy, knots[i + 1]).clamp(-LOGSNR_BOUND, LOGSNR_BOUND)
        high = torch.minimum(clean, knots[i]).clamp(-LOGSNR_BOUND, LOGSNR_BOUND)
        inside = invert_by_newton(self._time, self._density, t, low, high)
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
    """λ restricted to [low, high]: t'(λ) = (t(λ) - t(high)) / (t(low) - t(high)).

    p'(λ) = p(λ) / (t(low) - t(high)) between the bounds. All t in (0, 1) are drawn, also if the
    inner schedule is a table.

    Args:
        inner: schedule to restrict.
        low: λ of the noisiest level, at t = 1; below `high`.
        high: λ of the cleanest level, at t = 0.

    Raises:
        ValueError: The inner schedule has almost no levels between the bounds.
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
        """None: the levels are continuous, also if the inner schedule is a table."""

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


def _log_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive finite number")
    return math.log(value)
