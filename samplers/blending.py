"""Iterative α-(de)blending: the flow in z = x/(α+σ) over a = σ/(α+σ), where dz/da = ε - x_0."""

from dataclasses import dataclass, replace
from typing import Literal

from diffcore.noise import Noise
from diffcore.prediction import Prediction
from diffcore.samplers.base import Sampler, State
from diffcore.schedules import Level


@dataclass(frozen=True)
class AlphaBlending(Sampler):
    """Order 1: the first-order step. Order 2: z_s = z + (a_s - a)(ε - x_0) evaluated at the midpoint of a.

    Heitz et al. 2023 (2305.03486, Algorithm 3; there a counts from noise). Both need no exception at α = 0 or σ = 0.

    Args:
        order: 1, or 2 for the midpoint rule at two evaluations a step.
    """

    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}, expected 1 or 2")

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        knot = state.left[0]
        if self.order == 1:
            return state.reached(prediction.at(knot))
        velocity = prediction.eps - prediction.x0
        if state.memory is None:
            z = state.x / (state.level.alpha + state.level.sigma)
            middle = knot.schedule.at_blend((state.level.blend + knot.blend) / 2)
            x = (middle.alpha + middle.sigma) * (z + (middle.blend - state.level.blend) * velocity)
            return replace(state, x=x, level=middle, memory=(z, state.level.blend))
        z, blend = state.memory
        return state.reached((knot.alpha + knot.sigma) * (z + (knot.blend - blend) * velocity))

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return self.order * (len(knots) - 1)
