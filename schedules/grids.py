"""Grids: which knots a sampler visits. n steps are n+1 levels, strictly monotone in λ, the last one clean.

Knots are levels of the schedule that the network was trained with, in float64 on the host; samplers step between
neighbours and never recompute one. Almost every grid is even in some coordinate c of the level:

    c_i = ((g-i) c(first) + i c(last)) / g,  i = 0 .. g        g = n, or n-1 where a clean knot follows the last

so a grid is a coordinate and its two ends, and `Within` moves the ends.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from diffcore.schedules.base import Level, Schedule

CLEAN = math.inf


class Grid(ABC):
    """Knots for a schedule and a number of steps: from the noisiest level to the clean one, unless said otherwise."""

    @abstractmethod
    def _levels(self, schedule: Schedule, steps: int) -> list[Level]: ...

    def knots(self, schedule: Schedule, steps: int) -> tuple[Level, ...]:
        """Steps + 1 levels of `schedule`.

        Raises:
            ValueError: steps is below 1 or more than a table can give, or a knot is outside the schedule's levels.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        knots = tuple(self._levels(schedule, steps))
        _check_knots(self, schedule, knots)
        return knots


class GridSpan(NamedTuple):
    """What an even grid covers.

    Args:
        first: the first knot.
        last: the last knot of the even part.
        clean: whether a clean knot follows it.
    """

    first: Level
    last: Level
    clean: bool


class CoordinateGrid(Grid):
    """Knots that are even in a coordinate c of the level, which a subclass gives with its inverse and its ends."""

    @abstractmethod
    def _coordinate(self, level: Level) -> float:
        """C, strictly monotone."""

    @abstractmethod
    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        """The level that has this coordinate."""

    @abstractmethod
    def _span(self, schedule: Schedule) -> GridSpan: ...

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        first, last, clean = self._span(schedule)
        if not clean:
            return self._between(first, last, steps)
        inside = self._between(first, last, steps - 1) if steps > 1 else [first]
        return [*inside, schedule.at(CLEAN)]

    def _between(self, first: Level, last: Level, gaps: int) -> list[Level]:
        """Gaps + 1 levels from first to last, both exactly."""
        a, b = self._coordinate(first), self._coordinate(last)
        inside = [((gaps - i) * a + i * b) / gaps for i in range(1, gaps)]
        return [first, *(self._at(first.schedule, c) for c in inside), last]


@dataclass(frozen=True)
class Within(CoordinateGrid):
    """The same coordinate between two levels of one's choice, each exactly a knot: start and stop anywhere.

    Image-to-image starts at low = λ of the noise put on the image; stopping early is a finite `high`. An end that is left
    out is the grid's own, so with Karras or Linspace a clean knot still follows the last noisy one. On a table the knots
    lie between its entries.

    Args:
        grid: any grid but Explicit, whose knots are given one by one.
        low: λ of the first knot; -inf is the grid's own.
        high: λ of the last knot; inf is the grid's own.
    """

    grid: CoordinateGrid
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.grid, CoordinateGrid):
            raise ValueError(
                f"grid is {self.grid}, expected one that is even in some coordinate, not knots one by one"
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
                f"{self} has its first knot at λ = {first.logsnr:g} and its last noisy one at λ = {last.logsnr:g}: "
                f"give a lower `low`, a higher `high`, or a grid with other bounds"
            )
        return GridSpan(first, last, clean)


@dataclass(frozen=True)
class Explicit(Grid):
    """The knots themselves, as λ: strictly monotone in either direction, any ends.

    Args:
        logsnrs: n+1 values of λ = log α²/σ²; -inf is pure noise, +inf is clean.
    """

    logsnrs: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "logsnrs", tuple(float(logsnr) for logsnr in self.logsnrs))
        if len(self.logsnrs) < 2:
            raise ValueError(f"logsnrs has {len(self.logsnrs)} knots, expected at least 2")

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        if steps != len(self.logsnrs) - 1:
            raise ValueError(
                f"steps is {steps}, but Explicit has {len(self.logsnrs)} knots: pass {len(self.logsnrs) - 1}"
            )
        return [schedule.at(logsnr) for logsnr in self.logsnrs]


def check_falling(knots: tuple[Level, ...]) -> None:
    """Raise where knots do not fall in noise."""
    if len(knots) < 2 or not all(t.logsnr < s.logsnr for t, s in pairwise(knots)):
        raise ValueError(
            f"knots are at λ = {[knot.logsnr for knot in knots]}, expected two or more that fall in noise, as in sampling"
        )


def _check_knots(grid: Grid, schedule: Schedule, knots: tuple[Level, ...]) -> None:
    lowest = schedule.logsnr(1.0)
    for knot in knots:
        if not knot.logsnr >= lowest:
            raise ValueError(
                f"{grid} has a knot at λ = {knot.logsnr:g}, but {schedule} ends at λ = {lowest:g} "
                f"(σ/α = {math.exp(-lowest / 2):g}): choose bounds within it"
            )
    gaps = [b.logsnr - a.logsnr for a, b in pairwise(knots)]
    if not (all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)):
        raise ValueError(
            f"{grid} has knots at λ = {[knot.logsnr for knot in knots]}, expected strictly monotone levels"
        )
