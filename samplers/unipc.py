"""UniPC: a predictor and a corrector over λ that share their evaluations, so that the corrector is free."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.adams import History, Past
from diffcore.samplers.base import Sampler, State, times
from diffcore.samplers.dpm_solver import exact, gain, secant
from diffcore.schedules import Level, Real


class _Memory(NamedTuple):
    """The knots before, and the predictor's term beyond the first-order step that led here."""

    history: History
    predicted: Tensor | float


@dataclass(frozen=True)
class UniPC(Sampler):
    """Predict x_s from the last p values of x_0; once x_0 is asked there, correct x_s with it, and step on from that.

        UniP-p   σ_s ∫ (p(λ) - x_0) d(α/σ), p through the last p values
        UniC-p   the same with the value at s as well, of order p+1

    Zhao et al. 2023 (2302.04867, Algorithms 5 to 8, data prediction). UniP-2 and UniC-1 take B(h)/2 for the integral, B(h) = h
    (bh1) or 1 - e^{-h} (bh2), h = (λ_s - λ_t)/2; in all others B(h) cancels. One evaluation a step: the last knot is
    predicted only. UniP-2 with bh2 is DPM-Solver++(2M).

    A step that touches α = 0 or σ = 0 is the first-order step, and such a knot is not remembered.

    Args:
        p: order of the predictor, 1 to 3; the method's is p + 1.
        B: bh1, or bh2.
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

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        level, knot = state.level, state.left[0]
        now = Past(level, prediction.x0)
        x, history = prediction.at(knot), (now,)
        if state.memory is not None:
            past, predicted = state.memory
            x = x + times(knot.sigma / level.sigma, self._corrected(past, now) - predicted)
            history = (now, *past)[: self.p]
        if state.first_order:
            return state.reached(x)
        predicted = self._predicted(history, knot)
        return state.reached(x + predicted, _Memory(history, predicted))

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1

    def _predicted(self, history: History, s: Level) -> Tensor | float:
        if len(history) == 2:
            return secant(history, s, self._b(history[0].level, s) / 2)
        return exact(history, s)

    def _corrected(self, past: History, now: Past) -> Tensor | float:
        """The same integral, over the step that led to `now`, with its value."""
        t, x0 = past[0]
        if len(past) == 1:
            return times(self._b(t, now.level) / 2, now.value - x0)
        return exact((past[0], now, *past[1:]), now.level)

    def _b(self, t: Level, s: Level) -> Real:
        """α_s B(h)."""
        return s.alpha * (s.logsnr - t.logsnr) / 2 if self.B == "bh1" else gain(t, s)
