"""The samplers of EDM: Euler's and Heun's rule for dy/du = ε, y = x/α, u = σ/α, with churn at each
knot.

    û = u (1 + γ),   ŷ = y + √(û² - u²) S_noise z
    γ = min(S_churn / n, √2 - 1) if S_min ≤ u ≤ S_max, else 0

The noise is added before the network is evaluated, so the evaluated level is û: `start` adds it at
the first knot, and `advance` at each knot that it reaches.
"""

import math
from abc import ABC
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import (
    Knots,
    Memory,
    Sampler,
    State,
    is_falling,
    is_interior,
    multiply,
    require_number,
)
from diffcore.schedules import Level, Real

__all__ = ["Euler", "Heun"]


@dataclass(frozen=True)
class _ChurnSampler(Sampler[Memory], ABC):
    """Base of samplers with churn, which raise the noise level at each knot before the step.

    Args:
        churn: S_churn ≥ 0; 0 is the probability flow.
        churn_min: S_min, the smallest σ/α that is churned.
        churn_max: S_max, the greatest σ/α that is churned.
        noise_scale: S_noise, the standard deviation of the added noise.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn is {self.churn}, expected a finite number of at least 0")
        if not 0 <= self.churn_min <= self.churn_max:
            raise ValueError(
                f"churn_min and churn_max are {self.churn_min} and {self.churn_max}, "
                "expected 0 ≤ churn_min ≤ churn_max, both values of σ/α"
            )
        if not 0 <= self.noise_scale < math.inf:
            raise ValueError(
                f"noise_scale is {self.noise_scale}, expected a finite factor, about 1"
            )

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[Memory]:
        if self.churn and not is_falling(knots):
            raise ValueError("churn needs knots that fall in noise: to invert, use churn = 0")
        if self.churn and noise.path:
            raise ValueError(
                "churn raises the noise over intervals of levels that overlap, for which path=True "
                "has no independent noise: use path=False, or EulerAncestral"
            )
        return self._add_churn(super().start(x, knots, noise), noise)

    def _add_churn(self, state: State[Memory], noise: Noise) -> State[Memory]:
        """The state with its noise raised from u to û, at most to the schedule's noisiest level."""
        level, gamma = state.level, self._gamma(state)
        if gamma == 0:
            return state
        noisiest = level.schedule.logsnr(1.0)
        raised = level.schedule.at(max(_to_float(level.logsnr) - 2 * math.log1p(gamma), noisiest))
        spread = math.sqrt(max(_to_float(raised.ratio) ** 2 - _to_float(level.ratio) ** 2, 0.0))
        x = state.x * (
            raised.alpha / level.alpha
        ) + raised.alpha * spread * self.noise_scale * noise.step(state.step)
        return replace(state, x=x, level=raised)

    def _gamma(self, state: State[Memory]) -> float:
        """γ at a knot; 0 at the ends α = 0 and σ = 0."""
        if self.churn == 0 or state.done or not is_interior(state.level):
            return 0.0
        steps = state.step + len(state.remaining)
        is_churned = self.churn_min <= _to_float(state.level.ratio) <= self.churn_max
        return min(self.churn / steps, math.sqrt(2) - 1) if is_churned else 0.0


@dataclass(frozen=True)
class Euler(_ChurnSampler[None]):
    """y_s = ŷ + (u_s - û) ε: the first-order step from the churned level.

    Karras et al. 2022 (2206.00364, Algorithm 2 without its lines 6 to 8).

    Args:
        churn: S_churn ≥ 0; 0 is the probability flow.
        churn_min: S_min, the smallest σ/α that is churned.
        churn_max: S_max, the greatest σ/α that is churned.
        noise_scale: S_noise, the standard deviation of the added noise.
    """

    order = 1

    def advance(self, state: State[None], prediction: Prediction, noise: Noise) -> State[None]:
        return self._add_churn(state.at_next_knot(prediction.at(state.remaining[0])), noise)


class _FirstStage(NamedTuple):
    """Level and ε at the beginning of a step of Heun's rule."""

    level: Level
    eps: Tensor


@dataclass(frozen=True)
class Heun(_ChurnSampler[_FirstStage]):
    """y_s = ŷ + (u_s - û) (ε + ε')/2, with ε' evaluated at the result of the first-order step.

    There are two evaluations per step, and one in a step that touches σ = 0 or α = 0, which is not
    corrected. The order is 2 without churn.

    Karras et al. 2022 (2206.00364, Algorithm 1; Algorithm 2 with churn).

    Args:
        churn: S_churn ≥ 0; 0 is the probability flow.
        churn_min: S_min, the smallest σ/α that is churned.
        churn_max: S_max, the greatest σ/α that is churned.
        noise_scale: S_noise, the standard deviation of the added noise.
    """

    order = 2

    def advance(
        self, state: State[_FirstStage], prediction: Prediction, noise: Noise
    ) -> State[_FirstStage]:
        knot = state.remaining[0]
        if state.memory is None:
            x = prediction.at(knot)
            if state.is_first_order:
                return self._add_churn(state.at_next_knot(x), noise)
            memory = _FirstStage(state.level, prediction.eps)
            return replace(state, x=x, level=knot, memory=memory)
        before, eps = state.memory
        half = knot.alpha * (knot.ratio - before.ratio) / 2
        x = state.x + multiply(half, prediction.eps - eps)
        return self._add_churn(state.at_next_knot(x), noise)


def _to_float(value: Real) -> float:
    return require_number(value, "churn above 0", "use churn = 0")
