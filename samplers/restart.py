"""Restart: around a sampler of the flow, noise is added back over an interval of levels and integrated away again."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, SamplerWrapper, State, noisier
from diffcore.samplers.blending import AlphaBlending
from diffcore.schedules import Level

Run = tuple[Level, ...]
CLOSE = 1e-9  # in λ: a knot that is u_min but for rounding


class Memory(NamedTuple):
    """Where the inner sampler is in its run, and the runs that follow."""

    inner: State
    later: tuple[Run, ...]


@dataclass(frozen=True)
class Restart(SamplerWrapper):
    """At u_min: K times y + √(u_max² - u_min²) z, then `inner` from u_max down to u_min again; y = x/α, u = σ/α.

    Xu et al. 2023 (2306.14878, Algorithms 1 and 2). The noise makes the marginal at u_max from the one at u_min exactly, and
    contracts what errors the run has gathered; so the inner sampler should add none of its own. Levels within an interval are
    Karras' (ρ = 7). The grid gets u_min as a knot where it has none (the official code moves u_min to the nearest knot), and
    its steps is one less than the number of levels that the paper counts.

    Args:
        inner: integrates between the jumps; its memory starts anew after each.
        intervals: (u_min, u_max, steps, K) each, within the levels of the run; for data of standard deviation 0.5. The default
            is the paper's for CIFAR-10.
    """

    inner: Sampler = AlphaBlending(2)
    intervals: tuple[tuple[float, float, int, int], ...] = ((0.06, 0.3, 2, 2),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(tuple(interval) for interval in self.intervals))
        for interval in self.intervals:
            low, high, steps, repeats = interval
            if not (0 < low < high < math.inf and steps >= 1 and repeats >= 1):
                raise ValueError(
                    f"interval is {interval}, expected (u_min, u_max, steps, repeats) with 0 < u_min < u_max < inf"
                    f" and at least 1 step and 1 repeat"
                )

    def start(self, x: Tensor, knots: Run, noise: Noise) -> State:
        first, *rest = self._runs(knots)
        later = tuple(rest)
        return _outer(self.inner.start(x, first, _of_run(noise, later)), later)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        inner, later = state.memory
        inner = self.inner.advance(inner, prediction, _of_run(noise, later))
        if inner.done and later:
            run, *rest = later
            x = inner.x
            if run[0].logsnr < inner.level.logsnr:
                z = noise.branch(2 * len(later)).between(inner.level, run[0], inner.step)
                x = noisier(inner.x, inner.level, run[0], z)
            later = tuple(rest)
            inner = replace(self.inner.start(x, run, _of_run(noise, later)), step=inner.step)
        return _outer(inner, later)

    def forget(self, state: State) -> State:
        return replace(
            state, memory=state.memory._replace(inner=self.inner.forget(state.memory.inner))
        )

    def uses_guidance(self, state: State) -> bool:
        return self.inner.uses_guidance(state.memory.inner)

    def evaluations(self, knots: Run) -> int:
        return sum(self.inner.evaluations(run) for run in self._runs(knots))

    def _runs(self, knots: Run) -> list[Run]:
        """Runs of the inner sampler, one after the other: noise is added wherever the next begins above the last's end."""
        runs = [knots]
        for interval in sorted(self.intervals, reverse=True):
            runs += _restarts(runs.pop(), *interval)
        return [run for run in runs if len(run) > 1]


def _restarts(knots: Run, low: float, high: float, steps: int, repeats: int) -> list[Run]:
    """The run down to `low`, the repeats from `high` to it, and the rest of the run."""
    schedule = knots[0].schedule
    bottom, top = (-2 * math.log(u) for u in (low, high))
    if not knots[0].logsnr <= top < bottom <= knots[-1].logsnr:
        raise ValueError(
            f"the interval of σ/α from {low} to {high} is not within the run, from {knots[0].ratio:g} to "
            f"{knots[-1].ratio:g}: leave it out, or choose knots that fall in noise from above it to below it"
        )
    sigmas = [
        (high ** (1 / 7) + i / steps * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        for i in range(1, steps)
    ]
    end = schedule.at(bottom)
    again = (schedule.at(top), *(schedule.at(-2 * math.log(u)) for u in sigmas), end)
    before = tuple(knot for knot in knots if knot.logsnr < bottom - CLOSE)
    after = tuple(knot for knot in knots if knot.logsnr > bottom + CLOSE)
    return [(*before, end), *[again] * repeats, (end, *after)]


def _of_run(noise: Noise, later: tuple[Run, ...]) -> Noise:
    """Each run of the inner sampler draws noise of its own."""
    return noise.branch(2 * len(later) + 1)


def _outer(inner: State, later: tuple[Run, ...]) -> State:
    left = (*inner.left, *(knot for run in later for knot in run))
    return State(inner.x, inner.level, left, inner.step, Memory(inner, later))
