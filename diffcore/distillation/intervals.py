"""Intervals of noise levels: the two levels between which a consistency network is compared."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.objectives.weighting import EDM, Weight
from diffcore.schedules import Grid, Karras, Level, Schedule

__all__ = ["Intervals", "KnotIntervals", "ShrinkingIntervals"]


class Intervals(ABC):
    """A rule that pairs each level t with a cleaner level s, by the progress of the training."""

    @abstractmethod
    def check(self, process: Process) -> None:
        """Raise ValueError if the levels of a process do not fit."""

    @abstractmethod
    def levels(self, schedule: Schedule, times: Tensor, step: int) -> tuple[Level, Level]:
        """The noisy and the clean level of each sample.

        Args:
            schedule: schedule of the process.
            times: uniform times (B, 1, ...) in (0, 1], float64 on the host.
            step: number of the optimizer step.

        Returns:
            Two levels of the shape of `times`. The second one is clean (λ = inf) where it would be
            cleaner than the levels of training.
        """

    @abstractmethod
    def weight(self, level: Level, end: Level, sigma_data: float) -> Tensor:
        """Weight of the error of x_0, of the shape of the levels, float64 on the host.

        Args:
            level: noisy level.
            end: clean level.
            sigma_data: standard deviation of the data.
        """


@dataclass(frozen=True)
class KnotIntervals(Intervals):
    """The intervals between the knots of a grid, whose number N doubles during the training.

        N = min(first · 2^⌊step/period⌋, last)
        P(interval) = its share of the distribution of levels,   weight 1/(u_t - u_s), u = σ/α

    With the default grid and the schedule Normal.edm(-1.1, 2.0) it is improved consistency training
    (Song & Dhariwal 2023, 2310.14189, eq. 10 and table 1), whose period is K/(log2(last/first) + 1)
    for K steps. `first` = `last` = 50, the grid Trailing and `weighting` MSE("sample") are the
    steps of latent consistency models (Luo et al. 2023, 2310.04378), which skip 20 of 1000 levels.

    Args:
        grid: knots; the first one is the noisiest level of training, at which sampling starts.
        first: number N of intervals at the beginning, at least 1.
        last: largest number of intervals, at least `first`.
        period: number of steps after which N doubles, at least 1.
        weighting: weight w(λ) of the squared x_0 error at the noisy level; None is 1/(u_t - u_s).

    Raises:
        ValueError: a number is out of range.
    """

    grid: Grid = field(default_factory=Karras)
    first: int = 10
    last: int = 1280
    period: int = 10_000
    weighting: Weight | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(
                f"first and last are {self.first} and {self.last}, expected at least 1 interval, "
                "and first at most last"
            )
        if self.period < 1:
            raise ValueError(f"period is {self.period}, expected at least 1 step")

    def check(self, process: Process) -> None:
        knots = self.grid.knots(process.schedule, self.last)
        for knot in knots[:-1]:
            process.check_level(knot, f"a knot of {self.grid}")
        if self.weighting is None and knots[0].alpha == 0:
            raise ValueError(
                f"{self.grid} starts at pure noise, where 1/(u_t - u_s) is 0 and the network is "
                "not trained: use a grid that starts at a finite level (Karras), or set weighting "
                "to MSE(sample)"
            )
        if not math.isinf(float(knots[-1].logsnr)):
            raise ValueError(
                f"{self.grid} does not end clean: use a grid that does, such as Karras"
            )

    def count(self, step: int) -> int:
        """The number N of intervals at a step."""
        doublings = min(step // self.period, 64)
        return min(self.first * 2**doublings, self.last)

    def levels(self, schedule: Schedule, times: Tensor, step: int) -> tuple[Level, Level]:
        logsnr, knot_times = _knots(self.grid, schedule, self.count(step))
        # Uniform between the times of the first and the last knot: the share of each interval.
        t = knot_times[-1] + times * (knot_times[0] - knot_times[-1])
        index = torch.searchsorted(-knot_times, -t.contiguous(), right=True) - 1
        index = index.clamp(0, len(logsnr) - 2)
        return schedule.at(logsnr[index]), schedule.at(logsnr[index + 1])

    def weight(self, level: Level, end: Level, sigma_data: float) -> Tensor:
        if self.weighting is not None:
            return self.weighting(torch.as_tensor(level.logsnr), sigma_data)
        return 1 / torch.as_tensor(level.ratio - end.ratio)


@lru_cache(maxsize=8)
def _knots(grid: Grid, schedule: Schedule, count: int) -> tuple[Tensor, Tensor]:
    """λ and t of the knots, from noise to clean; a grid of many knots takes long to compute."""
    knots = grid.knots(schedule, count)
    return tuple(
        torch.tensor(values, dtype=torch.float64)
        for values in ([float(k.logsnr) for k in knots], [float(k.t) for k in knots])
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class ShrinkingIntervals(Intervals):
    """Levels of a continuous distribution, whose distance shrinks during the training:

        u_s = u_t max(0, 1 - (1 + k sigmoid(-b u_t)) / q^(1 + ⌊step/period⌋)),   u = σ/α

    The first intervals are long, for small u_t down to the clean level, and the training begins
    near that of a denoiser: a trained one is tuned in few steps.

    Source: Geng et al. 2024, easy consistency tuning (2406.14548): k = 8, b = 1, and levels of
    Normal.edm(-1.1, 2).

    Args:
        q: factor q > 1 by which the distance shrinks in each period.
        k: k ≥ 0, by which small levels have longer intervals.
        b: b > 0, the inverse of the u at which their length falls.
        period: number of steps of a stage, at least 1.
        stages: number of stages after which the intervals shrink no more.
        weighting: weight w(λ) of the squared x_0 error at the noisy level; SNR + 1/s² by default.

    Raises:
        ValueError: a number is out of range.
    """

    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    period: int = 10_000
    stages: int = 8
    weighting: Weight = field(default_factory=EDM)

    def __post_init__(self) -> None:
        if not 1 < self.q < math.inf:
            raise ValueError(f"q is {self.q}, expected a factor above 1")
        if not 0 <= self.k < math.inf or not 0 < self.b < math.inf:
            raise ValueError(f"k and b are {self.k} and {self.b}, expected k ≥ 0 and b > 0")
        if self.period < 1 or self.stages < 1:
            raise ValueError(
                f"period and stages are {self.period} and {self.stages}, expected at least 1"
            )

    def check(self, process: Process) -> None:
        return

    def levels(self, schedule: Schedule, times: Tensor, step: int) -> tuple[Level, Level]:
        level = schedule.level(times)
        stage = 1 + min(step // self.period, self.stages - 1)
        ratio = torch.as_tensor(level.ratio)
        share = 1 - (1 + self.k * torch.sigmoid(-self.b * ratio)) / self.q**stage
        logsnr = level.logsnr - 2 * share.clamp(min=0).log()
        cleanest = schedule.cleanest.logsnr_range[1]
        logsnr = torch.where(logsnr > cleanest, math.inf, logsnr)
        return level, schedule.at(logsnr)

    def weight(self, level: Level, end: Level, sigma_data: float) -> Tensor:
        return self.weighting(torch.as_tensor(level.logsnr), sigma_data)
