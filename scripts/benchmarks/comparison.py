"""Times of the same work by two sides, measured in alternation in one process.

    r_i = (seconds of ours in pair i) / (seconds of the other side in pair i)

Reported are the median of r and its interval by order statistics.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from diffcore.evaluation.flow.order_statistics import coverage, median_interval

__all__ = [
    "WARMUP_PAIRS",
    "Comparison",
    "check_pairs",
    "processor_clock",
    "repeat",
    "synchronize",
    "time_pairs",
]

MINIMUM_PAIRS = 30
WARMUP_PAIRS = 3


@dataclass(frozen=True)
class Comparison:
    """Seconds of both sides in each pair.

    Args:
        name: name of the work.
        bound: ratio that ours should not exceed; inf for none.
        ours: seconds of one unit of work by diffcore.
        other: seconds of the same work by the other side.
    """

    name: str
    bound: float
    ours: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """The seconds of ours over those of the other side, for each pair."""
        return [ours / other for ours, other in zip(self.ours, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that covers the median of the ratios' distribution."""
        return median_interval(self.ratios)

    @property
    def verdict(self) -> str:
        """The text met, undecided (the interval contains the bound) or missed; "" without bound."""
        if self.bound == math.inf:
            return ""
        if self.ratio <= self.bound:
            return "met"
        return "undecided" if self.interval[0] <= self.bound else "missed"

    @property
    def cells(self) -> list[str]:
        """The cells of a table: name, milliseconds of both sides, ratio, interval, bound."""
        low, high = self.interval
        return [
            self.name,
            f"{1000 * median(self.ours):.1f}",
            f"{1000 * median(self.other):.1f}",
            f"{self.ratio:.3f}",
            f"{low:.3f} to {high:.3f}",
            "" if self.bound == math.inf else str(self.bound),
        ]

    def to_json(self) -> dict[str, Any]:
        """Convert to plain data.

        Returns:
            The fields, the ratio and its interval.
        """
        return {
            **asdict(self),
            "bound": None if self.bound == math.inf else self.bound,
            "ratio": self.ratio,
            "interval": self.interval,
            "verdict": self.verdict,
            "coverage": coverage(len(self.ours)),
        }


def time_pairs(
    ours: Callable[[], object],
    other: Callable[[], object],
    pairs: int,
    warmup: int = WARMUP_PAIRS,
    clock: Callable[[], float] = perf_counter,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure both sides in alternation: ours first in even pairs, the other first in odd pairs.

    Args:
        ours: work by diffcore.
        other: the same work by the other side.
        pairs: number of measured pairs.
        warmup: number of pairs before them, which are dropped.
        clock: returns the time in seconds.

    Returns:
        Seconds of ours and of the other side in each measured pair.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(warmup + pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            start = clock()
            (ours, other)[side]()
            seconds[side].append(clock() - start)
    return tuple(seconds[0][warmup:]), tuple(seconds[1][warmup:])


def processor_clock() -> Callable[[], float]:
    """The clock of processor seconds, which other programs hardly change.

    Returns:
        The clock; with an accelerator, that of real seconds.
    """
    return perf_counter if torch.accelerator.is_available() else process_time


def check_pairs(pairs: int) -> None:
    """Refuse fewer pairs than a result needs.

    Args:
        pairs: number of pairs.

    Raises:
        ValueError: there are fewer than 30.
    """
    if pairs < MINIMUM_PAIRS:
        raise ValueError(
            f"pairs is {pairs}, expected at least {MINIMUM_PAIRS}: fewer cannot separate a ratio "
            "of 1.03 from the scatter"
        )


def repeat(step: Callable[[], object], count: int) -> Callable[[], None]:
    """Combine steps into one unit of work, which ends when the accelerator has finished them.

    Args:
        step: one step.
        count: number of steps.

    Returns:
        The unit of work.
    """

    def work() -> None:
        for _ in range(count):
            step()
        synchronize()

    return work


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
