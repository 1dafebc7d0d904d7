"""Grids place the knots of a sampler: n+1 levels for n steps, strictly monotone in λ.

Knots are levels of the schedule that the network was trained with, in float64 on the host. The last
knot is clean, unless a grid is given other bounds. Samplers step between neighbouring knots and
never recompute one. Almost every grid is uniform in a coordinate c of the level:

    c_i = ((g-i) c(first) + i c(last)) / g,  i = 0 .. g

where g = n, or g = n-1 if a clean knot follows the last one. Such a grid is a coordinate with two
bounds, and `Within` changes the bounds.

No network is evaluated at a cleaner level than those of its training (`Schedule.cleanest`): where
one of the first n knots would be cleaner, these n are uniform from c(first) to c(cleanest) instead,
and the last knot, at which no network is evaluated, stays where it is.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from diffcore.schedules.base import Level, Schedule

__all__ = ["CLEAN", "CoordinateGrid", "Explicit", "Grid", "GridSpan", "Within", "check_falling"]

CLEAN = math.inf
MAXIMUM_STEPS = 100_000
"""Largest number of steps: a file that declares more takes no memory."""
MAXIMUM_CACHED_STEPS = 1000
"""Largest number of steps whose knots are kept for the next call."""


class Grid(ABC):
    """A rule that places the knots for a schedule and a number of steps."""

    @abstractmethod
    def _levels(self, schedule: Schedule, steps: int) -> list[Level]: ...

    def knots(self, schedule: Schedule, steps: int) -> tuple[Level, ...]:
        """Compute the knots for a schedule and a number of steps.

        Args:
            schedule: schedule that the network was trained with.
            steps: number of steps n, at least 1; at most T on a table of T entries.

        Returns:
            n + 1 levels, strictly monotone in λ.

        Raises:
            ValueError: `steps` is below 1, above 100,000 or above the number of entries of a table,
                or a knot is noisier than the schedule, or one before the last is cleaner than its
                cleanest level. The message contains the bound.

        Examples:
            >>> from diffcore.schedules import Flow, Trailing
            >>> [knot.t for knot in Trailing().knots(Flow(), steps=4)]
            [1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        if steps > MAXIMUM_STEPS:
            raise ValueError(f"steps is {steps}, expected at most {MAXIMUM_STEPS:,}")
        if steps > MAXIMUM_CACHED_STEPS or not _is_hashable((self, schedule)):
            return _compute_knots(self, schedule, steps)
        return _cached_knots(self, schedule, steps)


def _compute_knots(grid: Grid, schedule: Schedule, steps: int) -> tuple[Level, ...]:
    knots = tuple(grid._levels(schedule, steps))
    _check_knots(grid, schedule, knots)
    return knots


_cached_knots = lru_cache(64)(_compute_knots)
"""The knots of equal arguments, which are frozen: a level takes about 50 µs to compute."""


def _is_hashable(value: object) -> bool:
    """Whether a value can be a key; a grid or schedule of a user may be no frozen dataclass."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


class GridSpan(NamedTuple):
    """The bounds of a grid that is uniform in a coordinate.

    Args:
        first: first knot.
        last: last knot of the uniform part.
        clean: True if a clean knot follows `last`.
    """

    first: Level
    last: Level
    clean: bool


class CoordinateGrid(Grid):
    """A grid that is uniform in a coordinate c of the level.

    A subclass implements `_coordinate`, c of a level; and `_at`, its inverse; it may override
    `_span`, the bounds.
    """

    @abstractmethod
    def _coordinate(self, level: Level) -> float:
        """The coordinate c of a level, strictly monotone in λ."""

    @abstractmethod
    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        """The level at the coordinate c."""

    def _span(self, schedule: Schedule) -> GridSpan:
        """The bounds; by default from the terminal level to clean."""
        return GridSpan(schedule.level(1.0), schedule.at(CLEAN), clean=False)

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        first, last, clean = self._span(schedule)
        end, cleanest = schedule.at(CLEAN) if clean else last, schedule.cleanest
        if not clean:
            knots = self._between(first, last, steps)
            if knots[-2].logsnr <= cleanest.logsnr:
                return knots
        last = min(last, cleanest, key=lambda level: level.logsnr)
        inside = self._between(first, last, steps - 1) if steps > 1 else [first]
        return [*inside, end]

    def _between(self, first: Level, last: Level, gaps: int) -> list[Level]:
        """gaps + 1 levels from `first` to `last`, both of them exact."""
        a, b = self._coordinate(first), self._coordinate(last)
        inside = [((gaps - i) * a + i * b) / gaps for i in range(1, gaps)]
        return [first, *(self._at(first.schedule, c) for c in inside), last]


@dataclass(frozen=True)
class Within(CoordinateGrid):
    """Another grid between other bounds: the knots are uniform in the same coordinate.

    Image-to-image sampling starts at `low`, the λ at which the image was noised; sampling with a
    finite `high` stops early. An infinite bound is that of the inner grid, so that with Karras or
    Linspace a clean knot still follows the last noisy one. On a table the knots are not restricted
    to its entries.

    Args:
        grid: inner grid; any grid except Explicit, which has no coordinate.
        low: λ of the first knot; -inf: first knot of the inner grid.
        high: λ of the last knot; inf: last knot of the inner grid.

    Examples:
        >>> from diffcore.schedules import Flow, UniformLogSNR
        >>> grid = Within(UniformLogSNR(), low=-2.0, high=4.0)
        >>> [knot.logsnr for knot in grid.knots(Flow(), steps=3)]
        [-2.0, 0.0, 2.0, 4.0]
    """

    grid: CoordinateGrid
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.grid, CoordinateGrid):
            raise ValueError(
                f"grid is {self.grid}, expected one that is uniform in a coordinate, not Explicit"
            )
        if not self.low < self.high:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected λ with low < high"
            )

    def _coordinate(self, level: Level) -> float:
        return self.grid._coordinate(level)

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return self.grid._at(schedule, coordinate)

    def _span(self, schedule: Schedule) -> GridSpan:
        first, last, clean = self.grid._span(schedule)
        if self.low > -math.inf:
            first = schedule.at(self.low)
        if self.high < math.inf:
            last, clean = schedule.at(self.high), False
        if not first.logsnr < last.logsnr:
            raise ValueError(
                f"{self} has its first knot at λ = {first.logsnr:g} and its last noisy one at λ = "
                f"{last.logsnr:g}: give a lower `low`, a higher `high`, or a grid with other bounds"
            )
        return GridSpan(first, last, clean)


@dataclass(frozen=True)
class Explicit(Grid):
    """Knots at given values of λ, strictly monotone in either direction.

    Args:
        logsnrs: n+1 values of λ = log α²/σ² for n steps; -inf is pure noise, +inf is clean data.
    """

    logsnrs: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "logsnrs", tuple(float(logsnr) for logsnr in self.logsnrs))
        if len(self.logsnrs) < 2:
            raise ValueError(f"logsnrs has {len(self.logsnrs)} knots, expected at least 2")

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        if steps != len(self.logsnrs) - 1:
            raise ValueError(
                f"steps is {steps}, but Explicit has {len(self.logsnrs)} knots: pass steps = "
                f"{len(self.logsnrs) - 1}"
            )
        return [schedule.at(logsnr) for logsnr in self.logsnrs]


def check_falling(knots: tuple[Level, ...]) -> None:
    """Raise ValueError unless there are two or more knots, each less noisy than the one before."""
    if len(knots) < 2 or not all(
        torch.as_tensor(t.logsnr < s.logsnr).all() for t, s in pairwise(knots)
    ):
        raise ValueError(
            f"knots are at λ = {[knot.logsnr for knot in knots]}, expected two or more that fall "
            "in noise, as in sampling"
        )


def _check_knots(grid: Grid, schedule: Schedule, knots: tuple[Level, ...]) -> None:
    lowest = schedule.logsnr(1.0)
    for knot in knots:
        if not knot.logsnr >= lowest:
            raise ValueError(
                f"{grid} has a knot at λ = {knot.logsnr:g}, but {schedule} ends at λ = {lowest:g} "
                f"(σ/α = {math.exp(-lowest / 2):g}): choose bounds within it"
            )
    for knot in knots[:-1]:
        if knot.is_beyond_training:
            raise ValueError(
                f"{grid} has a knot at λ = {knot.logsnr:g}, but the cleanest level of {schedule} "
                f"is λ = {schedule.cleanest.logsnr:g}: only the last knot may be cleaner"
            )
    gaps = [b.logsnr - a.logsnr for a, b in pairwise(knots)]
    if not (all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)):
        raise ValueError(
            f"{grid} has knots at λ = {[knot.logsnr for knot in knots]}, expected strictly "
            "monotone levels"
        )
