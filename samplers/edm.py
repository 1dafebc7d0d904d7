"""EDM's samplers: dy/du = ε in y = x/α, u = σ/α, by Euler's and Heun's rule, with noise churned in at each knot.

    û = u (1 + γ),   ŷ = y + √(û² - u²) S_noise z,   γ = min(S_churn / n, √2 - 1) where S_min ≤ u ≤ S_max, else 0

The noise is added before the network is asked, so the level asked about is û: after `start`, and after each arrival at a knot.
"""

import math
from abc import ABC
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, falls, interior, times
from diffcore.schedules import Level


@dataclass(frozen=True)
class _Churned(Sampler, ABC):
    """A step from û, and churn on arrival."""

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn is {self.churn}, expected a finite number of at least 0")
        if not 0 <= self.churn_min <= self.churn_max:
            raise ValueError(
                f"churn_min and churn_max are {self.churn_min} and {self.churn_max}, expected 0 ≤ min ≤ max of σ/α"
            )
        if not 0 <= self.noise_scale < math.inf:
            raise ValueError(
                f"noise_scale is {self.noise_scale}, expected a finite factor, about 1"
            )

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        if self.churn and not falls(knots):
            raise ValueError("churn needs knots that fall in noise: invert with churn = 0")
        return self._churned(super().start(x, knots, noise), noise)

    def _churned(self, state: State, noise: Noise) -> State:
        """The state with its noise raised from u to û, which is no noisier than the schedule's last level."""
        level, gamma = state.level, self._gamma(state)
        if gamma == 0:
            return state
        last = level.schedule.logsnr(1.0)
        raised = level.schedule.at(max(_float(level.logsnr) - 2 * math.log1p(gamma), last))
        fresh = math.sqrt(max(_float(raised.ratio) ** 2 - _float(level.ratio) ** 2, 0.0))
        x = state.x * (
            raised.alpha / level.alpha
        ) + raised.alpha * fresh * self.noise_scale * noise.step(state.step)
        return replace(state, x=x, level=raised)

    def _gamma(self, state: State) -> float:
        if self.churn == 0 or state.done or not interior(state.level):
            return 0.0
        steps = state.step + len(state.left)
        inside = self.churn_min <= _float(state.level.ratio) <= self.churn_max
        return min(self.churn / steps, math.sqrt(2) - 1) if inside else 0.0


@dataclass(frozen=True)
class Euler(_Churned):
    """y_s = ŷ + (u_s - û) ε: the first-order step from the churned level.

    Karras et al. 2022 (2206.00364, Algorithm 2 without its lines 6 to 8).

    Args:
        churn: S_churn ≥ 0; 0 is the probability flow.
        churn_min: S_min, the least σ/α that is churned.
        churn_max: S_max, the greatest.
        noise_scale: S_noise, the standard deviation of what is added.
    """

    order = 1

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        return self._churned(state.reached(prediction.at(state.left[0])), noise)

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1


class _Stage(NamedTuple):
    level: Level
    eps: Tensor


@dataclass(frozen=True)
class Heun(_Churned):
    """y_s = ŷ + (u_s - û) (ε + ε')/2, with ε' asked at the first-order step's result.

    Karras et al. 2022 (2206.00364, Algorithm 1; 2 with churn): two evaluations a step, and one in a step that touches σ = 0
    or α = 0, which is not corrected. Of order 2 without churn.

    Args:
        churn: S_churn ≥ 0; 0 is the probability flow.
        churn_min: S_min, the least σ/α that is churned.
        churn_max: S_max, the greatest.
        noise_scale: S_noise, the standard deviation of what is added.
    """

    order = 2

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        knot = state.left[0]
        if state.memory is None:
            x = prediction.at(knot)
            if state.first_order:
                return self._churned(state.reached(x), noise)
            return replace(state, x=x, level=knot, memory=_Stage(state.level, prediction.eps))
        before, eps = state.memory
        half = knot.alpha * (knot.ratio - before.ratio) / 2
        return self._churned(state.reached(state.x + times(half, prediction.eps - eps)), noise)

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return sum(2 if interior(t) and interior(s) else 1 for t, s in pairwise(knots))


def _float(value: object) -> float:
    if not isinstance(value, float | int):
        raise TypeError(
            "churn (above 0) is for a whole batch at one level, not for a map of levels: use churn = 0"
        )
    return float(value)
