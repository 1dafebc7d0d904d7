"""Iterative α-(de)blending: the flow in z = x/(α+σ) over a = σ/(α+σ), where dz/da = ε - x_0."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, clean, fresh
from diffcore.samplers.ddim import check_eta
from diffcore.schedules import Level


class Left(NamedTuple):
    """The knot that a midpoint step has left: z there, and its level."""

    z: Tensor
    level: Level


@dataclass(frozen=True)
class AlphaBlending(Sampler):
    """Order 1: the first-order step. Order 2: z_s = z + (a_s - a)(ε - x_0) evaluated at the midpoint of a.

    Heitz et al. 2023 (2305.03486; there a counts from noise). Both need no exception at α = 0 or σ = 0.

    Stochastic blending (η > 0) deblends to a level d cleaner than the knot s, u_d² = u_s² (1 - η²(1 - u_s²/u_t²)) with
    u = σ/α, and blends with fresh noise back up to it: x_s = (α_s/α_d) x_d + η σ_s √(1 - u_s²/u_t²) z. Whatever η, the noise
    makes the marginal at s from the one at d exactly, so the weak order is the flow's: 2 with the midpoint rule, at no more
    evaluations. With order 1 it is DDIM(η). (The paper's own stochastic form, its Algorithm 1, blends anew a pair (x_0, ε)
    drawn from its posterior given x, which no network gives; its randomness vanishes as steps are added, this one's does not.)

    Args:
        order: 1, or 2 for the midpoint rule at two evaluations a step.
        eta: η within [0, 1], the share of fresh noise; above 0 the knots must fall in noise.
    """

    order: Literal[1, 2] = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}, expected 1 or 2")
        check_eta(self.eta)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        t, s = state.level if state.memory is None else state.memory.level, state.left[0]
        still = self.eta == 0 or clean(s)
        end = s if still else self._cleaner(t, s)
        if self.order == 2 and state.memory is None:
            return self._to_midpoint(state, prediction, end)
        x = prediction.at(end) if self.order == 1 else _step(state.memory, end, prediction)
        return state.reached(x if still else self._blended(x, end, t, s, noise, state.step))

    def _cleaner(self, t: Level, s: Level) -> Level:
        """The level d to deblend to."""
        kept = 1 - self.eta**2 * fresh(t, s)
        return s.schedule.at(s.logsnr - math.log(kept) if kept > 0 else math.inf)

    def _to_midpoint(self, state: State, prediction: Prediction, end: Level) -> State:
        t = state.level
        left = Left(state.x / (t.alpha + t.sigma), t)
        middle = end.schedule.at_blend((t.blend + end.blend) / 2)
        return replace(state, x=_step(left, middle, prediction), level=middle, memory=left)

    def _blended(self, x: Tensor, d: Level, t: Level, s: Level, noise: Noise, step: int) -> Tensor:
        spread = self.eta * s.sigma * fresh(t, s) ** 0.5
        return (s.alpha / d.alpha) * x + spread * noise.between(t, s, step)

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return self.order * (len(knots) - 1)


def _step(left: Left, end: Level, prediction: Prediction) -> Tensor:
    """Euler's step in a, from the knot left to a level."""
    z = left.z + (end.blend - left.level.blend) * (prediction.eps - prediction.x0)
    return (end.alpha + end.sigma) * z
