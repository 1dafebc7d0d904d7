"""Scales w(λ): the strength of guidance at each level, for every rule that has a scale."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TypeGuard

from diffcore.schedules import Level

__all__ = [
    "ConstantScale",
    "CosineScale",
    "LinearScale",
    "Ramp",
    "Scale",
    "ScaleLike",
    "check_scale",
    "check_scale_value",
    "is_number",
    "scale_at",
]


class Scale(ABC):
    """A function w(λ) ≥ 0 that a YAML file and the command line can name."""

    @abstractmethod
    def __call__(self, logsnr: float) -> float:
        """The scale w at λ, which may be -inf or +inf."""


ScaleLike = float | Scale | Callable[[float], float]
"""What a rule accepts as its scale: a number, a scale schedule, or any function of λ."""


@dataclass(frozen=True)
class ConstantScale(Scale):
    """w(λ) = w.

    Args:
        value: w ≥ 0; 1 is the conditional model.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_scale_value(self.value)

    def __call__(self, logsnr: float) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp(Scale):
    """w(λ) = noisy + (clean - noisy) f(p),   p = (λ - low)/(high - low) clamped to [0, 1].

    Args:
        noisy: w ≥ 0 at λ ≤ low, the noisy end.
        clean: w ≥ 0 at λ ≥ high, the clean end.
        low: λ at which the ramp begins; finite.
        high: λ at which the ramp ends; finite, above low.
    """

    noisy: float
    clean: float
    low: float = -6.0
    high: float = 6.0

    def __post_init__(self) -> None:
        check_scale_value(self.noisy)
        check_scale_value(self.clean)
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected finite λ with low < high"
            )

    def __call__(self, logsnr: float) -> float:
        p = min(max((logsnr - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.noisy + (self.clean - self.noisy) * self.profile(p)

    @abstractmethod
    def profile(self, p: float) -> float:
        """f(p), a number that rises from 0 at p = 0 to 1 at p = 1."""


@dataclass(frozen=True)
class LinearScale(Ramp):
    """w(λ) linear in λ between its two ends: f(p) = p.

    Args:
        noisy: w ≥ 0 at λ ≤ low, the noisy end.
        clean: w ≥ 0 at λ ≥ high, the clean end.
        low: λ at which the ramp begins; finite.
        high: λ at which the ramp ends; finite, above low.
    """

    def profile(self, p: float) -> float:
        return p


@dataclass(frozen=True)
class CosineScale(Ramp):
    """w(λ) with f(p) = (1 - cos πp)/2 between its two ends, where its slope is 0.

    Args:
        noisy: w ≥ 0 at λ ≤ low, the noisy end.
        clean: w ≥ 0 at λ ≥ high, the clean end.
        low: λ at which the ramp begins; finite.
        high: λ at which the ramp ends; finite, above low.
    """

    def profile(self, p: float) -> float:
        return (1 - math.cos(math.pi * p)) / 2


def is_number(scale: object) -> TypeGuard[float]:
    """Whether a scale is a real number, also one of numpy."""
    return isinstance(scale, Real)


def check_scale(scale: ScaleLike) -> None:
    """Check that a scale is a number w ≥ 0 or a function of λ.

    Raises:
        ValueError: it is something else, such as a class or a string.
    """
    if is_number(scale):
        check_scale_value(scale)
    elif isinstance(scale, type) or not callable(scale):
        raise ValueError(
            f"scale is {scale!r}, expected a number, a scale schedule, or a function of λ"
        )


def check_scale_value(scale: float) -> None:
    """Check that a scale is a finite number w ≥ 0.

    Raises:
        ValueError: it is negative, infinite, NaN, or no number.
    """
    if not is_number(scale) or not 0 <= scale < math.inf:
        raise ValueError(
            f"scale is {scale!r}, expected a finite w ≥ 0 (1 is the conditional model)"
        )


def scale_at(scale: ScaleLike, level: Level) -> float:
    """The scale w at a level, a number.

    Raises:
        ValueError: the function of λ returned a value that is negative or not finite.
    """
    if not callable(scale):
        return float(scale)
    value = float(scale(float(level.logsnr)))
    if not 0 <= value < math.inf:
        raise ValueError(
            f"scale is {value} at λ = {float(level.logsnr):g}, expected a finite w ≥ 0 at every "
            "level"
        )
    return value
