"""Grids that are uniform in a function of the time t; on a table the knots are its entries."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.special import betainc, betaincinv

from diffcore.schedules.base import Level, Schedule
from diffcore.schedules.grids import CLEAN, CoordinateGrid, GridSpan

__all__ = [
    "BetaSpacing",
    "BoundedTimeGrid",
    "Leading",
    "Linspace",
    "Quadratic",
    "TimeGrid",
    "Trailing",
]


class TimeGrid(CoordinateGrid):
    """A grid in the time t of a continuous schedule, or in the index i of a table, t = (i+1)/T.

    A subclass implements `_indices` and, if it is not uniform in t, the coordinate and its inverse.
    """

    @abstractmethod
    def _indices(self, steps: int, total: int) -> Iterable[int]:
        """Indices into a table of `total` entries, strictly decreasing."""

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        total = schedule.steps
        if total is None:
            return self._times(schedule, steps)
        if steps > total:
            raise ValueError(
                f"{self} cannot take {steps} steps: the schedule is a table of {total} levels, "
                "which is the largest number of steps"
            )
        return [
            *(schedule.level((i + 1) / total) for i in self._indices(steps, total)),
            schedule.at(CLEAN),
        ]

    def _times(self, schedule: Schedule, steps: int) -> list[Level]:
        return super()._levels(schedule, steps)

    def _coordinate(self, level: Level) -> float:
        return float(level.t)

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return schedule.level(coordinate)


@dataclass(frozen=True)
class Trailing(TimeGrid):
    """t_i = (n-i)/n; on a table of T the indices round(T (n-i)/n) - 1, then a clean knot.

    Lin et al. 2023 (2305.08891, Table 2). The first knot is the terminal level for any n. The
    indices are computed in integers.
    """

    def _indices(self, steps: int, total: int) -> Iterable[int]:
        return (round(total * (steps - i) / steps) - 1 for i in range(steps))


class BoundedTimeGrid(TimeGrid):
    """A grid with a last noisy knot at the time `last`, followed by a clean one.

    On a table the last noisy knot is an entry, and `last` has no effect.
    """

    last: float

    def __post_init__(self) -> None:
        if not 0 < self.last < 1:
            raise ValueError(f"last is {self.last}, expected a time in (0, 1)")

    def _span(self, schedule: Schedule) -> GridSpan:
        return GridSpan(schedule.level(1.0), schedule.level(self.last), clean=True)


@dataclass(frozen=True)
class Linspace(BoundedTimeGrid):
    """t_i = 1 - (1 - last) i/(n-1), then a clean knot; on a table of T the indices from T-1 to 0.

    iDDPM (2102.09672). The indices are round((T-1) (n-1-i)/(n-1)). A continuous schedule has no
    cleanest noisy level, so that `last` is the time of the last noisy knot.

    Args:
        last: time in (0, 1) of the last noisy knot on a continuous schedule; no effect on a table.
    """

    last: float = 1e-3

    def _indices(self, steps: int, total: int) -> Iterable[int]:
        gaps = max(steps - 1, 1)
        return (round((total - 1) * (gaps - i) / gaps) for i in range(steps))


@dataclass(frozen=True)
class Leading(BoundedTimeGrid):
    """t_i = last + (1 - last) (n-1-i)/n, then clean; on a table the indices (n-1-i) ⌊T/n⌋ + offset.

    The grid of DDIM and Stable Diffusion (2305.08891, Table 2). The first knot is about one step
    below the terminal level, so that sampling starts with less noise than the noisiest level of
    training.

    Args:
        offset: index of the last noisy entry of a table (steps_offset of diffusers; 1 for Stable
            Diffusion), at least 0; no effect on a continuous schedule.
        last: time in (0, 1) of the last noisy knot on a continuous schedule; no effect on a table.
    """

    offset: int = 0
    last: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}, expected an index of at least 0")

    def _indices(self, steps: int, total: int) -> Iterable[int]:
        first = (steps - 1) * (total // steps) + self.offset
        if first >= total:
            raise ValueError(
                f"{self} starts {steps} steps at index {first} of a table of {total} levels: use "
                "fewer steps or offset 0"
            )
        return range(first, self.offset - 1, -(total // steps))

    def _times(self, schedule: Schedule, steps: int) -> list[Level]:
        first, last, _ = self._span(schedule)
        return [*self._between(first, last, steps)[1:], schedule.at(CLEAN)]


@dataclass(frozen=True)
class Quadratic(TimeGrid):
    """t_i = ((n-i)/n)², uniform in √t; on a table of T round((T-1) ((n-1-i)/(n-1))²), then clean.

    DDIM (2010.02502, appendix D: τ_i = ⌊c i²⌋, c such that the last is close to T; here it is T-1).
    Indices that round to the same entry move to the nearest free entries.
    """

    def _indices(self, steps: int, total: int) -> Iterable[int]:
        gaps = max(steps - 1, 1)
        return _distinct(
            [round((total - 1) * ((gaps - i) / gaps) ** 2) for i in range(steps)], total
        )

    def _coordinate(self, level: Level) -> float:
        return math.sqrt(float(level.t))

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return schedule.level(coordinate**2)


@dataclass(frozen=True)
class BetaSpacing(TimeGrid):
    """t_i = I⁻¹((n-i)/n; a, b), quantiles of a Beta distribution: dense at both ends of t.

    Lee et al. 2024, "Beta Sampling is All You Need" (2407.12173): a = b = 0.6. On a table of T the
    indices are round(T t_i) - 1, then clean; indices that round to the same entry move to the
    nearest free entries.

    Args:
        a: first exponent, > 0; below 1 the knots are dense at t = 0.
        b: second exponent, > 0; below 1 the knots are dense at t = 1.
    """

    a: float = 0.6
    b: float = 0.6

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(f"a and b are {self.a} and {self.b}, expected positive finite numbers")

    def _indices(self, steps: int, total: int) -> Iterable[int]:
        times = [betaincinv(self.a, self.b, (steps - i) / steps) for i in range(steps)]
        return _distinct([round(total * t) - 1 for t in times], total)

    def _coordinate(self, level: Level) -> float:
        return float(betainc(self.a, self.b, level.t))

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return schedule.level(float(betaincinv(self.a, self.b, coordinate)))


def _distinct(decreasing: list[int], total: int) -> list[int]:
    """Strictly decreasing indices of range(total) near the given ones; the first is unchanged.

    Repeated indices move down, then negative ones move up.
    """
    indices = list(decreasing)
    for i in range(1, len(indices)):
        indices[i] = min(indices[i], indices[i - 1] - 1)
    floor = range(len(indices) - 1, -1, -1)
    return [max(index, lowest) for index, lowest in zip(indices, floor, strict=True)]
