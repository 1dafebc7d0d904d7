"""DPM-Solver++: x_0 is held and expanded over λ, of which x_s/σ_s = x/σ + ∫ x_0 d(α/σ) is the exact solution.

With h = (λ_s - λ_t)/2, the first-order step is x_s = (σ_s/σ_t) x + α_s (1 - e^{-h}) x_0, and is DDIM.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.adams import History, Past, exponential_moments
from diffcore.samplers.base import Sampler, State, interior, times
from diffcore.samplers.lagrange import weights
from diffcore.schedules import Level, Real


class _Stage(NamedTuple):
    """The first half of a singlestep step."""

    level: Level
    prediction: Prediction


Variant = Literal["1", "2S", "2M", "3M", "3M published"]


@dataclass(frozen=True)
class DPMSolverPP(Sampler):
    """x_s = first-order step + α_s (1 - e^{-h}) (D - x_0), D the x_0 that the step goes towards.

        2S   D = x_0 asked at the middle of λ, two evaluations a step
        2M   D = x_0 + (x_0 - x_0') h / 2h',  x_0' the last knot's, h' the last step
        3M   the quadratic through three x_0, integrated exactly: Adams-Bashforth(3) in (x_0, λ), of order 3

    Lu et al. 2022 (2211.01095, Algorithms 1 and 2; Appendix B for the third order). `3M published` has the coefficients in
    print, in k-diffusion and in diffusers, where the quadratic term counts half (φ_3 for 2φ_3): that is of order 2.

    A step that touches α = 0 or σ = 0 is the first-order step, and such a knot is not remembered.

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

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        if self.variant == "2S":
            return _singlestep(state, prediction)
        now, knot = Past(state.level, prediction.x0), state.left[0]
        history: History = (now, *(state.memory or ()))
        x = prediction.at(knot)
        if not state.first_order:
            x = x + self._correction(history, knot)
        remembered = history if interior(state.level) else ()
        return state.reached(x, remembered[: int(self.variant[0]) - 1])

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        if self.variant != "2S":
            return len(knots) - 1
        return sum(2 if interior(t) and interior(s) else 1 for t, s in pairwise(knots))

    def _correction(self, history: History, s: Level) -> Tensor | float:
        match self.variant, len(history):
            case "2M", 2:
                return secant(history, s, gain(history[0].level, s) / 2)
            case "3M published", 3:
                return exact(history, s) - _missing(history, s)
        return exact(history, s)


def gain(t: Level, s: Level) -> Real:
    """α_s (1 - e^{-h}): what a step adds for each unit of x_0."""
    return s.alpha - t.alpha * s.sigma / t.sigma


def secant(history: History, s: Level, coefficient: Real) -> Tensor:
    """What h dx_0/d(λ/2) from the last two knots adds, times a coefficient."""
    (t, x0), (before, x0_before) = history[:2]
    return times(coefficient * (s.logsnr - t.logsnr) / (t.logsnr - before.logsnr), x0 - x0_before)


def exact(history: History, s: Level) -> Tensor | float:
    """σ_s ∫ (p(λ) - x_0) d(α/σ), p the polynomial in λ through the history."""
    (t, x0), *past = history
    if not past:
        return 0.0
    w = weights([level.logsnr for level, _ in history], exponential_moments(t, s, len(past)))
    return sum(times(s.sigma * w_j, x0_j - x0) for w_j, (_, x0_j) in zip(w, past, strict=True))


def _missing(history: History, s: Level) -> Tensor:
    """Half the integral of the quadratic term, x_0[t, t', t''] (λ-λ_t)²: what the published third order leaves out."""
    (t, x0), (t1, x1), (t2, x2) = history
    r1, r2 = t1.logsnr - t.logsnr, t2.logsnr - t.logsnr
    half = s.sigma * exponential_moments(t, s, 2)[1] / 2
    return times(half / (r1 * (r1 - r2)), x1 - x0) - times(half / (r2 * (r1 - r2)), x2 - x0)


def _singlestep(state: State, prediction: Prediction) -> State:
    knot = state.left[0]
    if state.memory is None:
        if state.first_order:
            return state.reached(prediction.at(knot))
        middle = knot.schedule.at((state.level.logsnr + knot.logsnr) / 2)
        return replace(
            state, x=prediction.at(middle), level=middle, memory=_Stage(state.level, prediction)
        )
    t, first = state.memory
    return state.reached(first.at(knot) + times(gain(t, knot), prediction.x0 - first.x0))
