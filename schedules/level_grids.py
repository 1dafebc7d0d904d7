"""Grids that are uniform in a function of λ or σ/α, independent of the time of the schedule."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy import special

from diffcore.schedules.base import Level, Schedule
from diffcore.schedules.grids import CLEAN, CoordinateGrid, GridSpan

__all__ = ["AlignYourSteps", "Karras", "UniformBlend", "UniformLogSNR"]

Table = Literal["sd15", "sdxl", "svd"]
PUBLISHED_TABLES: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
ROUNDING_TOLERANCE = 1e-3
"""Tolerance in λ within which the first entry of a table is the terminal level of the schedule.

The published tables are rounded: their 14.615 stands for 14.6146.
"""


@dataclass(frozen=True)
class Karras(CoordinateGrid):
    """u_i = (u_max^(1/ρ) + i/(n-1) (u_min^(1/ρ) - u_max^(1/ρ)))^ρ, u = σ/α, then a clean knot.

    Karras et al. 2022 (2206.00364, eq. 5). The default bounds are for data of standard deviation
    0.5; for data of standard deviation s multiply them by 2s. One step is [sigma_max, clean].

    Args:
        sigma_min: σ/α of the last noisy knot, above 0; at least that of the cleanest level of
            training.
        sigma_max: σ/α of the first knot, finite.
        rho: ρ > 0; a larger value puts more knots near the data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max are {self.sigma_min} and {self.sigma_max}, expected 0 < "
                "sigma_min < sigma_max < inf"
            )
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}, expected a positive finite number")

    def _coordinate(self, level: Level) -> float:
        return float(level.ratio) ** (1 / self.rho)

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return _at_ratio(schedule, coordinate**self.rho)

    def _span(self, schedule: Schedule) -> GridSpan:
        return GridSpan(
            _at_ratio(schedule, self.sigma_max), _at_ratio(schedule, self.sigma_min), clean=True
        )


@dataclass(frozen=True)
class UniformLogSNR(CoordinateGrid):
    """λ_i = ((n-1-i) low + i high) / (n-1), uniform in λ, then a clean knot.

    Lu et al. 2022 (2206.00927). One step is [low, clean].

    Args:
        low: λ of the first knot, finite.
        high: λ of the last noisy knot, finite; at most that of the cleanest level of training.
    """

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected finite λ with low < high"
            )

    def _coordinate(self, level: Level) -> float:
        return float(level.logsnr)

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return schedule.at(coordinate)

    def _span(self, schedule: Schedule) -> GridSpan:
        return GridSpan(schedule.at(self.low), schedule.at(self.high), clean=True)


@dataclass(frozen=True)
class UniformBlend(CoordinateGrid):
    """a_i = a_0 (n-i)/n, a = v/(1+v), v = (u/center)^(1/ρ), u = σ/α, from the terminal level.

    With ρ = 1 and center = 1, a is σ/(α+σ), and this is the grid of iterative α-(de)blending
    (2305.03486; its α is 1 - a), on which AlphaBlending keeps its order down to the clean knot. For
    any schedule it places the knots where Trailing places them on the schedule Flow.

    In general the knots are uniform quantiles of a logistic distribution of λ with mean
    -2 ln center and scale 2ρ. Near the data the coordinate is that of Karras, u^(1/ρ), but it stays
    finite at pure noise (a = 1). On a table the knots are not restricted to its entries.

    Args:
        rho: ρ > 0; a larger value puts more knots near noise and near the data.
        center: σ/α > 0 at which the knots are densest in λ; 1 is for data of standard deviation 1.
    """

    rho: float = 1.0
    center: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("center", self.center)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a positive finite number")

    def _coordinate(self, level: Level) -> float:
        return float(
            special.expit(-(float(level.logsnr) + 2 * math.log(self.center)) / (2 * self.rho))
        )

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        return schedule.at(
            -2 * self.rho * float(special.logit(coordinate)) - 2 * math.log(self.center)
        )


@dataclass(frozen=True)
class AlignYourSteps(CoordinateGrid):
    """Align Your Steps: ln u_i, u = σ/α, interpolates 11 knots that were optimised for one model.

    Sabour et al. 2024 (2404.14507): the tables of σ/α of the paper's project page, and its
    log-linear interpolation in i/n to other numbers of steps. The tables of timesteps beside them,
    which diffusers has too, are these levels rounded to entries of the table. With 10 steps the
    knots are the table, except that a clean knot replaces its last entry.

    Args:
        table: sd15, sdxl or svd, the published tables of three models, or the decreasing positive
            σ/α that were optimised for another model.
    """

    table: Table | tuple[float, ...] = "sd15"

    def __post_init__(self) -> None:
        if not isinstance(self.table, str):
            object.__setattr__(self, "table", tuple(float(sigma) for sigma in self.table))
        elif self.table not in PUBLISHED_TABLES:
            raise ValueError(
                f"table is {self.table!r}, expected {', '.join(PUBLISHED_TABLES)}, or decreasing "
                "values of σ/α"
            )
        decreases = all(a > b > 0 for a, b in pairwise(self._sigmas))
        if not decreases or len(self._sigmas) < 2:
            raise ValueError(
                f"table is {self._sigmas}, expected at least 2 values of σ/α that decrease and "
                "stay above 0"
            )

    @property
    def _sigmas(self) -> tuple[float, ...]:
        return PUBLISHED_TABLES[self.table] if isinstance(self.table, str) else self.table

    def _coordinate(self, level: Level) -> float:
        """Position in the table, from 0 at its first entry to its number of steps at clean data."""
        logsnrs = _logsnrs(self._sigmas)
        if level.logsnr < logsnrs[0] + ROUNDING_TOLERANCE:
            return 0.0
        return float(np.interp(level.logsnr, logsnrs, np.arange(len(logsnrs))))

    def _at(self, schedule: Schedule, coordinate: float) -> Level:
        logsnrs = _logsnrs(self._sigmas)
        return schedule.at(float(np.interp(coordinate, np.arange(len(logsnrs)), logsnrs)))

    def _span(self, schedule: Schedule) -> GridSpan:
        first, terminal = _at_ratio(schedule, self._sigmas[0]), schedule.level(1.0)
        is_terminal = abs(float(first.logsnr) - float(terminal.logsnr)) < ROUNDING_TOLERANCE
        return GridSpan(terminal if is_terminal else first, schedule.at(CLEAN), clean=False)


def _at_ratio(schedule: Schedule, ratio: float) -> Level:
    """The level at u = σ/α."""
    return schedule.at(-2 * math.log(ratio))


def _logsnrs(ratios: tuple[float, ...]) -> list[float]:
    """λ of σ/α; decreasing σ/α give increasing λ."""
    return [-2 * math.log(ratio) for ratio in ratios]
