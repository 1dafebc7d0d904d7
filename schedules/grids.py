"""Grids: which knots a sampler visits. n steps are n+1 levels, strictly monotone in λ, the last one clean.

Knots are levels of the schedule that the network was trained with, in float64 on the host; samplers step between
neighbours and never recompute one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class Trailing(Grid):
    """t_i = (n-i)/n; on a table of T the indices round(T (n-i)/n) - 1, in integers, then clean.

    Lin et al. 2023 (2305.08891, Table 2). The first knot is the terminal level, whatever n.
    """

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        total = schedule.steps
        if total is None:
            times = [(steps - i) / steps for i in range(steps)]
        else:
            _check_table(self, steps, total)
            times = [round(total * (steps - i) / steps) / total for i in range(steps)]
        return [*map(schedule.level, times), schedule.at(CLEAN)]


@dataclass(frozen=True)
class Linspace(Grid):
    """n times evenly from t = 1 to the cleanest level, then clean: on a table the indices T-1 .. 0, rounded.

    iDDPM (2102.09672). A continuous schedule has no cleanest level, so `last` names the time of the last one before clean.

    Args:
        last: time in (0, 1) of the last noisy knot on a continuous schedule.
    """

    last: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.last < 1:
            raise ValueError(f"last is {self.last}, expected a time in (0, 1)")

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        total, gaps = schedule.steps, max(steps - 1, 1)
        if total is None:
            times = [1 + (self.last - 1) * i / gaps for i in range(steps)]
        else:
            _check_table(self, steps, total)
            times = [(round((total - 1) * (gaps - i) / gaps) + 1) / total for i in range(steps)]
        return [*map(schedule.level, times), schedule.at(CLEAN)]


@dataclass(frozen=True)
class Karras(Grid):
    """u_i = (u_max^(1/ρ) + i/(n-1) (u_min^(1/ρ) - u_max^(1/ρ)))^ρ of u = σ/α, then clean.

    Karras et al. 2022 (2206.00364, eq. 5). The bounds are for data of standard deviation 0.5; multiply them by the data's
    over 0.5 for other data. One step is [sigma_max, clean].

    Args:
        sigma_min: σ/α of the last noisy knot, above 0.
        sigma_max: σ/α of the first knot, finite.
        rho: ρ > 0; larger puts more knots near the data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max are {self.sigma_min} and {self.sigma_max}, expected 0 < min < max < inf"
            )
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}, expected a positive finite number")

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = [(high + i / max(steps - 1, 1) * (low - high)) ** self.rho for i in range(steps)]
        return [schedule.at(-2 * math.log(sigma)) for sigma in sigmas] + [schedule.at(CLEAN)]


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """λ_i evenly from `low` to `high`, then clean. Lu et al. 2022 (2206.00927). One step is [low, clean].

    Args:
        low: λ of the first knot, finite.
        high: λ of the last noisy knot, finite.
    """

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low and high are {self.low} and {self.high}, expected finite λ with low < high")

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        gaps = max(steps - 1, 1)
        logsnrs = [self.low + (self.high - self.low) * i / gaps for i in range(steps)]
        return [schedule.at(logsnr) for logsnr in [*logsnrs, CLEAN]]


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


def _check_table(grid: Grid, steps: int, total: int) -> None:
    if steps > total:
        raise ValueError(f"{grid} cannot take {steps} steps: the schedule is a table of {total} levels")


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
