"""Schedules that are fast enough for half a million knots, and checks of knots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from diffcore.schedules import Discrete, Flow, Level, Schedule


@dataclass(frozen=True)
class CachedTable(Discrete):
    """A table that computes each of its levels once."""

    @cache  # noqa: B019
    def level(self, t: float) -> Level:
        return super().level(t)


@dataclass(frozen=True)
class ScalarFlow(Flow):
    """The schedule Flow in Python floats."""

    def level(self, t: float) -> Level:
        logsnr = 2 * math.log((1 - t) / t) if 0 < t < 1 else math.inf * (1 - 2 * t)
        return Level(logsnr, t, 1 - t, t, self)

    at_blend = level

    def at(self, logsnr: float) -> Level:
        t = 1 / (1 + math.exp(logsnr / 2)) if logsnr < 1000 else 0.0
        return Level(logsnr, t, 1 - t, t, self)


def is_decreasing_in_noise(knots: Sequence[Level]) -> bool:
    """Whether λ increases strictly from knot to knot."""
    return all(a.logsnr < b.logsnr for a, b in pairwise(knots))


def check_full_range(knots: Sequence[Level], schedule: Schedule, steps: int) -> None:
    """Assert that `steps` strictly monotone steps lead from the terminal level to clean data."""
    assert len(knots) == steps + 1
    assert knots[0].logsnr == schedule.logsnr(1.0)
    assert knots[-1].logsnr == math.inf
    assert is_decreasing_in_noise(knots)


def table_indices(knots: Sequence[Level], total: int) -> list[int]:
    """Table indices of the noisy knots; asserts that their times (i+1)/T are exact."""
    times = [level.t for level in knots[:-1]]
    indices = [round(t * total) - 1 for t in times]
    assert times == [(i + 1) / total for i in indices]
    return indices
