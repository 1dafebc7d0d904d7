"""DPM-Solver++ for the probability flow and the reverse SDE, with x_0 extrapolated in λ.

x_s/σ_s = x/σ + ∫ x_0 d(α/σ) is the exact solution of the flow. With h = (λ_s - λ_t)/2, the
first-order step is x_s = (σ_s/σ_t) x + α_s (1 - e^{-h}) x_0, which is DDIM.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.transition import fresh_noise_share
from diffcore.samplers.adams import History, KnotValue, exponential_moments
from diffcore.samplers.base import (
    Sampler,
    State,
    is_clean,
    is_interior,
    multiply,
    renoise_prediction,
)
from diffcore.samplers.lagrange import polynomial_correction
from diffcore.schedules import Level, Real

__all__ = ["DPMSolverPP", "DPMSolverSDE", "data_gain", "polynomial_term", "secant_term"]

Variant = Literal["1", "2S", "2M", "3M", "3M published"]


class _FirstStage(NamedTuple):
    """Level and prediction at the beginning of a singlestep step."""

    level: Level
    prediction: Prediction


@dataclass(frozen=True)
class DPMSolverPP(Sampler[History | _FirstStage]):
    """x_s = first-order step + α_s (1 - e^{-h}) (D - x_0), D the estimate of x_0 over the step.

        2S   D = x_0 evaluated at the middle of λ, two evaluations per step
        2M   D = x_0 + (x_0 - x_0') h / 2h',  x_0' at the last knot, h' the last step
        3M   D from the quadratic through three x_0, integrated exactly; this is
             Adams-Bashforth(3) in (x_0, λ), of order 3

    Lu et al. 2022 (2211.01095, Algorithms 1 and 2; Appendix B for the third order). `3M published`
    has the coefficients of the paper, of k-diffusion and of diffusers. They contain half of the
    quadratic term (φ_3 instead of 2φ_3), which reduces the order to 2.

    A step that touches α = 0 or σ = 0 is the first-order step, and x_0 at such a knot is not kept.

    Args:
        variant: 1, 2S, 2M, 3M, or 3M published.
    """

    variant: Variant = "2M"

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(
                f"variant is {self.variant!r}, expected one of {', '.join(get_args(Variant))}"
            )

    @property
    def order(self) -> int:
        return {"1": 1, "3M": 3}.get(self.variant, 2)

    def advance(
        self, state: State[History | _FirstStage], prediction: Prediction, noise: Noise
    ) -> State[History | _FirstStage]:
        memory, knot = state.memory, state.remaining[0]
        if isinstance(memory, _FirstStage):
            return _second_stage(state, memory, prediction)
        if self.variant == "2S" and not state.is_first_order:
            return _to_second_stage(state, prediction)
        history: History = (KnotValue(state.level, prediction.x0), *(memory or ()))
        x = prediction.at(knot)
        if self.variant == "2S":
            return state.at_next_knot(x)
        if not state.is_first_order:
            x = x + self._correction(history, knot)
        kept = history if is_interior(state.level) else ()
        return state.at_next_knot(x, kept[: int(self.variant[0]) - 1])

    def _correction(self, history: History, s: Level) -> Tensor | float:
        """α_s (1 - e^{-h}) (D - x_0) of the multistep variants, with the values that exist."""
        match self.variant, len(history):
            case "2M", 2:
                return secant_term(history, s, data_gain(history[0].level, s) / 2)
            case "3M published", 3:
                return polynomial_term(history, s) - _unpublished_half(history, s)
        return polynomial_term(history, s)


def data_gain(t: Level, s: Level) -> Real:
    """The scalar α_s (1 - e^{-h}), the change of x in a step from t to s for each unit of x_0."""
    return s.alpha - t.alpha * s.sigma / t.sigma


def secant_term(history: History, s: Level, coefficient: Real) -> Tensor:
    """coefficient · h dx_0/d(λ/2), with the slope estimated from the last two knots.

    Args:
        history: x_0 at the last knots, of which two are used.
        s: level at the end of the step.
        coefficient: factor of the result.

    Returns:
        The term that the slope adds to the step, of the shape of x.
    """
    (t, x0), (before, x0_before) = history[:2]
    weight = coefficient * (s.logsnr - t.logsnr) / (t.logsnr - before.logsnr)
    return multiply(weight, x0 - x0_before)


def polynomial_term(history: History, s: Level) -> Tensor | float:
    """σ_s ∫ (p(λ) - x_0) d(α/σ), with p the polynomial in λ through the history.

    Returns:
        (B, *shape), the shape of x_0; 0 for a history of one value.
    """
    if len(history) == 1:
        return 0.0
    nodes = [level.logsnr for level, _ in history]
    moments = exponential_moments(history[0].level, s, len(history) - 1)
    return polynomial_correction([x0 for _, x0 in history], nodes, moments, s.sigma)


def _unpublished_half(history: History, s: Level) -> Tensor:
    """Half the integral of x_0[t, t', t''] (λ-λ_t)², which `3M published` omits."""
    (t, x0), (t1, x1), (t2, x2) = history
    r1, r2 = t1.logsnr - t.logsnr, t2.logsnr - t.logsnr
    half = s.sigma * exponential_moments(t, s, 2)[1] / 2
    return multiply(half / (r1 * (r1 - r2)), x1 - x0) - multiply(half / (r2 * (r1 - r2)), x2 - x0)


def _to_second_stage(
    state: State[History | _FirstStage], prediction: Prediction
) -> State[History | _FirstStage]:
    """The state at the middle of λ between the current level and the next knot."""
    knot = state.remaining[0]
    middle = knot.schedule.at((state.level.logsnr + knot.logsnr) / 2)
    memory = _FirstStage(state.level, prediction)
    return replace(state, x=prediction.at(middle), level=middle, memory=memory)


def _second_stage(
    state: State[History | _FirstStage], first: _FirstStage, prediction: Prediction
) -> State[History | _FirstStage]:
    """The state at the next knot, computed with x_0 at the middle of λ.

    Args:
        state: the state at the middle.
        first: level and prediction at the beginning of the step.
        prediction: prediction at the middle.
    """
    t, knot = first.level, state.remaining[0]
    change = multiply(data_gain(t, knot), prediction.x0 - first.prediction.x0)
    return state.at_next_knot(first.prediction.at(knot) + change)


DataHistory = tuple[tuple[Real, Tensor], ...]
"""(λ, x_0) at the last knots, newest first."""


@dataclass(frozen=True)
class DPMSolverSDE(Sampler[DataHistory]):
    """DPM-Solver++ for the reverse SDE: the linear part and the noise are integrated exactly.

        x_s = (σ_s/σ_t) e^(-ηh) x + (1+η) α_s ∫ e^(-(1+η)(h-τ)) x_0(τ) dτ + σ_s √(1 - e^(-2ηh)) z,
        τ from 0 to h = (λ_s-λ_t)/2

    x_0(τ) is the polynomial through the last `steps` predictions. η = 0 is the multistep
    DPM-Solver++, one step at η = 1 is DDIM(1). The quadratic's weight is that of the integral,
    twice the published one. Pure noise has no information on the slope of x_0 in λ, so that
    prediction is not kept. The step to the clean level is x_0.

    The weak order is 2 with two steps and, for η > 0, with three too: the last differences of x_0
    contain the noise of the last steps. Three steps still have a smaller error.

    η = 1 with two steps is by Lu et al. 2022 (2211.01095, appendix). Other η and three steps are
    those of k-diffusion (2M SDE and 3M SDE).

    Args:
        steps: number of predictions used, 1 to 3 (2 is 2M, 3 is 3M).
        eta: η ≥ 0, the amount of fresh noise: 0 is the flow, 1 the reverse SDE. Above 0 the knots
            must fall in noise.
        solver: weight of the slope with two steps: heun integrates it, midpoint gives it half of
            the step's weight.
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

    def advance(
        self, state: State[DataHistory], prediction: Prediction, noise: Noise
    ) -> State[DataHistory]:
        t, s = state.level, state.remaining[0]
        if is_clean(s):
            return state.at_next_knot(prediction.at(s))
        first_order = prediction
        if self.eta > 0:
            share = 1 - (1 - fresh_noise_share(t, s)) ** self.eta
            z = noise.between(t, s, state.step)
            first_order = renoise_prediction(prediction, share, z)
        past = state.memory or ()
        x = first_order.at(s)
        if past and is_interior(s):
            correction = self._correction(prediction.x0, t.logsnr, s.logsnr, past)
            x = x + multiply(s.alpha, correction)
        kept = ((t.logsnr, prediction.x0), *past) if is_interior(t) else ()
        return state.at_next_knot(x, kept[: self.steps - 1] or None)

    def _correction(self, x0: Tensor, t: Real, s: Real, past: DataHistory) -> Tensor:
        """The terms that slope and curvature of x_0 in λ add to the step, divided by α_s.

        Args:
            x0: prediction at the beginning of the step.
            t: λ at the beginning of the step.
            s: λ at its end.
            past: earlier values, newest first, at least one.
        """
        H = (1 + self.eta) * (s - t) / 2
        flat_weight = (-H).expm1() * -1 if isinstance(H, Tensor) else -math.expm1(-H)
        slope_weight = 1 - flat_weight / H
        (logsnr1, x1), *older = past
        near = multiply((s - t) / (t - logsnr1), x0 - x1)
        if not older:
            is_midpoint = self.steps == 2 and self.solver == "midpoint"
            return multiply(flat_weight / 2 if is_midpoint else slope_weight, near)
        ((logsnr2, x2),) = older
        far = multiply((s - t) / (logsnr1 - logsnr2), x1 - x2)
        r0, r = (t - logsnr1) / (s - t), (t - logsnr2) / (s - t)
        curvature = multiply(1 / r, near - far)
        slope = near + multiply(r0, curvature)
        return multiply(slope_weight, slope) + multiply(1 - 2 * slope_weight / H, curvature)
