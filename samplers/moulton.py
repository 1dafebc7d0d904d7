"""Adams-Moulton: a predictor and a corrector that share their evaluations, whatever is held and in whatever variable."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.adams import PAST, Adams, History, Past
from diffcore.samplers.base import State, times
from diffcore.schedules import Level


class _Memory(NamedTuple):
    """How many values this run uses, the knots before, and the predictor's term beyond the first-order step that led here."""

    k: int
    history: History = ()
    predicted: Tensor | float = 0.0


@dataclass(frozen=True)
class AdamsMoulton(Adams):
    """x_s = first-order step + c_s Σ_j w_j (f_j - f_0), then again with the f_s that is asked there, and on from that.

        predict    the polynomial through the last k values, which is AdamsBashforth(k)
        correct    the one through these and the value at s: of order k+1

    c = α, α+σ or σ for eps, velocity or x0. One evaluation a step: x_s is corrected with the value at its prediction, which
    serves the next step too, and the last knot is predicted only. Hairer, Nørsett & Wanner, Solving Ordinary Differential
    Equations I, III.1, as PEC. UniPC is this for x_0 over λ, but for its secants (UniPC(3) from the third step on is k = 3).

    A step that touches α = 0 or σ = 0 is the first-order step of its prediction, and a knot there is not remembered. The flow
    form (velocity, a) needs no exception.

    A polynomial through many values far apart strays, most of all under strong guidance: with `every`, a run of n steps uses
    no more than 1 + n // every of them.

    Args:
        k: values that the predictor uses, 1 to 4; the order is k + 1, in the variable `index` 2.
        held: eps, x0, or velocity (ε - x_0).
        variable: what the held quantity is a polynomial of: u, a, logsnr, t, or the step's index.
        every: steps for each value after the first; 0 uses k of them in any run.
    """

    every: int = 0
    most: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0:
            raise ValueError(
                f"every is {self.every}, expected a number of steps, or 0 for k values in any run"
            )

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        k = min(self.k, 1 + (len(knots) - 1) // self.every) if self.every else self.k
        return replace(super().start(x, knots, noise), memory=_Memory(k))

    def forget(self, state: State) -> State:
        return replace(state, memory=_Memory(state.memory.k))

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        level, knot = state.level, state.left[0]
        k, past, predicted = state.memory
        x = prediction.at(knot)
        if state.first_order and not self._everywhere:
            return state.reached(x, _Memory(k))
        now = Past(level, self._held(prediction))
        if past:
            corrected = self._correction((past[0], now, *past[1:]), level, (0, 1, *PAST[1:]))
            x = x + times(self._scale(knot) / self._scale(level), corrected - predicted)
        history: History = (now, *past)[:k]
        predicted = self._correction(history, knot)
        return state.reached(x + predicted, _Memory(k, history, predicted))

    def _order(self) -> int:
        return self.k + 1
