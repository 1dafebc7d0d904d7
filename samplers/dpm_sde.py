"""DPM-Solver++ for the reverse SDE: x_0 extrapolated in λ, linear part and noise integrated exactly."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, clean, fresh, renoised
from diffcore.schedules import Level

Past = tuple[tuple[float, Tensor], ...]
"""(λ, x_0) of the steps before, the last one first."""


@dataclass(frozen=True)
class DPMSolverSDE(Sampler):
    """x_s = (σ_s/σ_t) e^(-ηh) x + (1+η) α_s ∫ e^(-(1+η)(h-τ)) x_0(τ) dτ + σ_s √(1 - e^(-2ηh)) z, τ from 0 to h = (λ_s-λ_t)/2.

    x_0(τ) is the polynomial through the last `steps` predictions. Lu et al. 2022 (2211.01095, appendix; η = 1) and, for any η
    and for three steps, k-diffusion's 2M SDE and 3M SDE. η = 0 is the multistep DPM-Solver++, one step at η = 1 DDIM(1).
    The quadratic's weight is the integral's, twice the published one. Pure noise says nothing of the slope of x_0 in λ, so
    that prediction is not remembered; the step to the clean level is x_0.

    The weak order is 2 with two steps and, for η > 0, with three too: the last differences of x_0 hold the noise of the last
    steps. Three still err less.

    Args:
        steps: predictions used, 1 to 3 (2 is 2M, 3 is 3M).
        eta: η ≥ 0, the SDE's noise; above 0 the knots must fall in noise.
        solver: weight of the slope with two steps: heun integrates it, midpoint gives it half of the step's weight.
    """

    steps: Literal[1, 2, 3] = 2
    eta: float = 1.0
    solver: Literal["midpoint", "heun"] = "midpoint"

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3):
            raise ValueError(f"steps is {self.steps}, expected 1, 2 or 3 predictions")
        if not 0 <= self.eta < math.inf:
            raise ValueError(
                f"eta is {self.eta}, expected η ≥ 0 (0 is the flow, 1 the reverse SDE)"
            )
        if self.solver not in ("midpoint", "heun"):
            raise ValueError(f"solver is {self.solver!r}, expected midpoint or heun")

    @property
    def order(self) -> int:
        return min(self.steps, 2) if self.eta else self.steps

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        t, s = state.level, state.left[0]
        if clean(s):
            return state.reached(prediction.at(s))
        flat = prediction
        if self.eta > 0:
            share = 1 - (1 - fresh(t, s)) ** self.eta
            flat = renoised(prediction, share, noise.between(t, s, state.step))
        past: Past = state.memory or ()
        x = flat.at(s) + s.alpha * self._bend(prediction.x0, float(t.logsnr), float(s.logsnr), past)
        seen = ((t.logsnr, prediction.x0), *past) if t.logsnr > -math.inf else ()
        return state.reached(x, seen[: self.steps - 1] or None)

    def _bend(self, x0: Tensor, t: float, s: float, past: Past) -> Tensor | float:
        """What the slope and the curvature of x_0 in λ add to the step, over α_s."""
        if not past:
            return 0.0
        H = (1 + self.eta) * (s - t) / 2
        flat = -math.expm1(-H)
        slope = 1 - flat / H
        first, *older = past
        near = (x0 - first[1]) * ((s - t) / (t - first[0]))
        if not older:
            return (flat / 2 if self.steps == 2 and self.solver == "midpoint" else slope) * near
        ((last, x0_last),) = older
        far = (first[1] - x0_last) * ((s - t) / (first[0] - last))
        r0, r = (t - first[0]) / (s - t), (t - last) / (s - t)
        curve = (near - far) / r
        return slope * (near + r0 * curve) + (1 - 2 * slope / H) * curve

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1
