"""UniPC: a predictor and a corrector over λ that share their evaluations, so that the corrector
needs no evaluation of its own.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.adams import History, KnotValue
from diffcore.samplers.base import Sampler, State, multiply
from diffcore.samplers.dpm_solver import data_gain, polynomial_term, secant_term
from diffcore.schedules import Level, Real

__all__ = ["UniPC"]


class _UniPCMemory(NamedTuple):
    """Memory of `UniPC`.

    Args:
        history: x_0 at the last knots, newest first.
        predicted: the predictor's correction of the first-order step that led to the current knot.
    """

    history: History
    predicted: Tensor | float


@dataclass(frozen=True)
class UniPC(Sampler[_UniPCMemory]):
    """Predict x_s from the last p values of x_0, then correct it with x_0 at the predicted x_s.

        UniP-p   σ_s ∫ (p(λ) - x_0) d(α/σ), p through the last p values
        UniC-p   the same with the value at s as well, of order p+1

    UniP-2 and UniC-1 replace the integral by B(h)/2, with B(h) = h (bh1) or 1 - e^{-h} (bh2) and
    h = (λ_s - λ_t)/2; in all others B(h) cancels. There is one evaluation per step. At the last
    knot x is predicted but not corrected. UniP-2 with bh2 is DPM-Solver++(2M).

    A step that touches α = 0 or σ = 0 is the first-order step, and x_0 at such a knot is not kept.

    Zhao et al. 2023 (2302.04867, Algorithms 5 to 8, data prediction).

    Args:
        p: order of the predictor, 1 to 3; the order of the method is p + 1.
        B: the function B(h): bh1 is h, bh2 is 1 - e^{-h}.
    """

    p: Literal[1, 2, 3] = 2
    B: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        if self.p not in (1, 2, 3):
            raise ValueError(f"p is {self.p}, expected a predictor of order 1 to 3")
        if self.B not in ("bh1", "bh2"):
            raise ValueError(f"B is {self.B!r}, expected bh1 or bh2")

    @property
    def order(self) -> int:
        return self.p + 1

    def advance(
        self, state: State[_UniPCMemory], prediction: Prediction, noise: Noise
    ) -> State[_UniPCMemory]:
        level, knot = state.level, state.remaining[0]
        newest = KnotValue(level, prediction.x0)
        x = prediction.at(knot)
        history: History = (newest,)
        if state.memory is not None:
            past, predicted = state.memory
            correction = self._corrector_term(past, newest) - predicted
            x = x + multiply(knot.sigma / level.sigma, correction)
            history = (newest, *past)[: self.p]
        if state.is_first_order:
            return state.at_next_knot(x)
        predicted = self._predictor_term(history, knot)
        return state.at_next_knot(x + predicted, _UniPCMemory(history, predicted))

    def _predictor_term(self, history: History, s: Level) -> Tensor | float:
        """The term that UniP adds to the first-order step to s."""
        if len(history) == 2:
            return secant_term(history, s, self._scaled_b(history[0].level, s) / 2)
        return polynomial_term(history, s)

    def _corrector_term(self, past: History, newest: KnotValue) -> Tensor | float:
        """The term that UniC adds to the first-order step that led to the newest knot."""
        t, x0 = past[0]
        if len(past) == 1:
            return multiply(self._scaled_b(t, newest.level) / 2, newest.value - x0)
        return polynomial_term((past[0], newest, *past[1:]), newest.level)

    def _scaled_b(self, t: Level, s: Level) -> Real:
        """α_s B(h)."""
        return s.alpha * (s.logsnr - t.logsnr) / 2 if self.B == "bh1" else data_gain(t, s)
