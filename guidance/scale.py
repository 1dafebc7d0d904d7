"""Scales w(λ): how strong guidance is at each level, for every rule that has a scale."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from diffcore.schedules import Level


class Scale(ABC):
    """A function w(λ) ≥ 0 that YAML and the command line can name."""

    @abstractmethod
    def __call__(self, logsnr: float) -> float:
        """The scale at λ, -inf and +inf included."""


ScaleLike = float | Scale | Callable[[float], float]


@dataclass(frozen=True)
class ConstantScale(Scale):
    """w(λ) = w.

    Args:
        value: w ≥ 0.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_value(self.value)

    def __call__(self, logsnr: float) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp(Scale):
    """From w = `noisy` at λ ≤ `low` to w = `clean` at λ ≥ `high`, by a shape p from 0 to 1.

    Args:
        noisy: w at the noisy end.
        clean: w at the clean end.
        low: λ where the ramp begins.
        high: λ where it ends.
    """

    noisy: float
    clean: float
    low: float = -6.0
    high: float = 6.0

    def __post_init__(self) -> None:
        check_value(self.noisy)
        check_value(self.clean)
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected finite λ with low < high"
            )

    def __call__(self, logsnr: float) -> float:
        p = min(max((logsnr - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.noisy + (self.clean - self.noisy) * self.shape(p)

    @abstractmethod
    def shape(self, p: float) -> float:
        """From 0 at p = 0 to 1 at p = 1."""


@dataclass(frozen=True)
class LinearScale(Ramp):
    """w(λ) straight in λ between its two ends."""

    def shape(self, p: float) -> float:
        return p


@dataclass(frozen=True)
class CosineScale(Ramp):
    """w(λ) with (1 - cos πp)/2 between its two ends: level at both."""

    def shape(self, p: float) -> float:
        return (1 - math.cos(math.pi * p)) / 2


def check_scale(scale: ScaleLike) -> None:
    """Raise where `scale` is neither a number that a scale may be, nor a function of λ."""
    if isinstance(scale, (int, float)):
        check_value(scale)
    elif isinstance(scale, type) or not callable(scale):
        raise ValueError(
            f"scale is {scale!r}, expected a number, a scale schedule, or a function of λ"
        )


def check_value(scale: float) -> None:
    """Raise where `scale` is no number that a scale may be."""
    if not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        raise ValueError(
            f"scale is {scale!r}, expected a finite w ≥ 0 (1 is the conditional model)"
        )


def scale_at(scale: ScaleLike, level: Level) -> float:
    """W at a level.

    Raises:
        ValueError: a function of λ answered with something below 0 or not finite.
    """
    if isinstance(scale, (int, float)):
        return scale
    value = float(scale(float(level.logsnr)))
    if not 0 <= value < math.inf:
        raise ValueError(
            f"scale is {value} at λ = {float(level.logsnr):g}, expected a finite w ≥ 0 at every level"
        )
    return value
