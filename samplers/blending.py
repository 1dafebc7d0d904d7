"""Iterative α-(de)blending: the flow in z = x/(α+σ) over a = σ/(α+σ), where dz/da = ε - x_0."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.transition import fresh_noise_share
from diffcore.samplers.base import Sampler, State, is_clean, multiply
from diffcore.samplers.ddim import check_eta
from diffcore.schedules import Level

__all__ = ["AlphaBlending"]


class _StepStart(NamedTuple):
    """z and the level at the beginning of a step whose midpoint is evaluated next."""

    z: Tensor
    level: Level


@dataclass(frozen=True)
class AlphaBlending(Sampler[_StepStart]):
    """z_s = z + (a_s - a)(ε - x_0), with ε - x_0 at the current knot (order 1) or at the midpoint
    of a (order 2).

    Order 1 is the first-order step, which is DDIM. Steps that touch α = 0 or σ = 0 need no
    exception. A step whose midpoint is cleaner than the levels of training is of order 1.

    Stochastic blending (η > 0) deblends to a level d cleaner than the knot s,
    u_d² = u_s² (1 - η²(1 - u_s²/u_t²)) with u = σ/α, and blends with fresh noise back to s:
    x_s = (α_s/α_d) x_d + η σ_s √(1 - u_s²/u_t²) z. The noise turns the marginal at d into the one
    at s exactly for every η, so the weak order is that of the flow: 2 with the midpoint rule, with
    the same number of evaluations. With order 1 it is DDIM(η). The stochastic form of the paper,
    Algorithm 1, is another: it blends a pair (x_0, ε) from the posterior given x, which a denoiser
    does not provide, and its randomness vanishes as the number of steps grows.

    Heitz et al. 2023 (2305.03486, where a counts from noise).

    Args:
        order: 1, or 2 for the midpoint rule with two evaluations per step.
        eta: η within [0, 1], the amount of fresh noise; above 0 the knots must fall in noise.
    """

    order: Literal[1, 2] = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}, expected 1 or 2")
        check_eta(self.eta)

    def advance(
        self, state: State[_StepStart], prediction: Prediction, noise: Noise
    ) -> State[_StepStart]:
        t, s = state.level if state.memory is None else state.memory.level, state.remaining[0]
        is_deterministic = self.eta == 0 or is_clean(s)
        end = s if is_deterministic else self._deblending_level(t, s)
        if state.memory is not None:
            x = _euler_step(state.memory, end, prediction)
        else:
            middle = end.schedule.at_blend((t.blend + end.blend) / 2)
            if self.order == 2 and not middle.is_beyond_training:
                return _to_midpoint(state, prediction, middle)
            x = prediction.at(end)
        if not is_deterministic:
            spread = self.eta * s.sigma * fresh_noise_share(t, s) ** 0.5
            z = noise.between(t, s, state.step)
            x = multiply(s.alpha / end.alpha, x) + multiply(spread, z)
        return state.at_next_knot(x)

    def _deblending_level(self, t: Level, s: Level) -> Level:
        """The level d of stochastic blending, cleaner than s."""
        kept = 1 - self.eta**2 * fresh_noise_share(t, s)
        if isinstance(kept, Tensor):
            return s.schedule.at(s.logsnr - kept.log())
        return s.schedule.at(s.logsnr - math.log(kept) if kept > 0 else math.inf)


def _to_midpoint(
    state: State[_StepStart], prediction: Prediction, middle: Level
) -> State[_StepStart]:
    """The state at `middle`, the midpoint of a, after Euler's step from the current level."""
    t = state.level
    start = _StepStart(multiply(1 / (t.alpha + t.sigma), state.x), t)
    x = _euler_step(start, middle, prediction)
    return replace(state, x=x, level=middle, memory=start)


def _euler_step(start: _StepStart, end: Level, prediction: Prediction) -> Tensor:
    """x at `end` after Euler's step in a from the beginning of the step."""
    slope = prediction.eps - prediction.x0
    z = start.z + multiply(end.blend - start.level.blend, slope)
    return multiply(end.alpha + end.sigma, z)
