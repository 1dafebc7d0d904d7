"""Adaptive Runge-Kutta methods for v = dz/da = ε - x_0, z = x/(α+σ), a = σ/(α+σ): embedded pairs
with error control.

    k_1 = v(z, a),            k_i = v(z + h Σ_j a_ij k_j, a + c_i h)
    z' = z + h Σ_i b_i k_i,   error = h Σ_i e_i k_i

The last stage of both pairs is evaluated at z', so it is also the first stage of the next step.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Knots, Sampler, State, is_interior, require_number
from diffcore.schedules import Level

__all__ = ["PAIRS", "AdaptiveRungeKutta"]


class _EmbeddedPair(NamedTuple):
    """Coefficients of an embedded pair.

    Args:
        order: order of convergence of the higher-order method.
        rows: the rows a_ij, from the second stage on; the last row is b.
        error: e, which is b minus the weights of the lower-order method.
    """

    order: int
    rows: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]


def _fractions(text: str) -> tuple[float, ...]:
    """Numbers from fractions separated by spaces."""
    return tuple(float(Fraction(word)) for word in text.split())


PAIRS = {
    "BogackiShampine": _EmbeddedPair(  # 1989: 3(2), four stages
        3,
        (_fractions("1/2"), _fractions("0 3/4"), _fractions("2/9 1/3 4/9")),
        _fractions("-5/72 1/12 1/9 -1/8"),
    ),
    "DormandPrince": _EmbeddedPair(  # 1980: 5(4), seven stages
        5,
        (
            _fractions("1/5"),
            _fractions("3/40 9/40"),
            _fractions("44/45 -56/15 32/9"),
            _fractions("19372/6561 -25360/2187 64448/6561 -212/729"),
            _fractions("9017/3168 -355/33 46732/5247 49/176 -5103/18656"),
            _fractions("35/384 0 500/1113 125/192 -2187/6784 11/84"),
        ),
        _fractions("71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40"),
    ),
}
"""The embedded pairs by name."""

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 5.0
"""Step-size control: safety factor, and bounds of the ratio of consecutive step sizes."""

MIN_STEP = 1e-9
"""Smallest step in a; below it the error is rounding, and the tolerance cannot be met."""


class _Attempt(NamedTuple):
    """A step whose stages are being evaluated.

    Args:
        z: z at the beginning of the step.
        a: a at the beginning of the step.
        h: length of the step in a.
        slopes: k_1, k_2, ... evaluated so far.
    """

    z: Tensor
    a: float
    h: float
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True)
class AdaptiveRungeKutta(Sampler[_Attempt | float]):
    """Runge-Kutta method that keeps the root mean square of error / (atol + rtol max(|z|, |z'|)) at
    most 1 in each step.

    Each sample of the batch meets the tolerance. The sampler begins a new step at each knot, so few
    knots are best (a grid of one step is enough). The number of evaluations is known only after the
    run.

    The sample with the largest error determines the steps of the whole batch, so a sample depends
    on the others, within the tolerance. Because these decisions depend on the samples, this
    sampler, unlike all others, synchronises with the device.

    A step from α = 0 needs no exception. The network is never evaluated at the end of a step to
    α = 0 or σ = 0: over the last `atol` of a the step is the first-order step. So it is from the
    cleanest level of training to a cleaner knot.

    Args:
        pair: the embedded pair, BogackiShampine (1989, order 3) or DormandPrince (1980, order 5).
        rtol: tolerance of one step relative to |z|.
        atol: absolute tolerance of one step in z.
    """

    # The memory is an _Attempt within a step; at a knot, the length |h| of the first step from it.

    pair: Literal["BogackiShampine", "DormandPrince"] = "DormandPrince"
    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self) -> None:
        if self.pair not in PAIRS:
            raise ValueError(f"pair is {self.pair!r}, expected one of {', '.join(PAIRS)}")
        if not 0 <= self.rtol < math.inf:
            raise ValueError(f"rtol is {self.rtol}, expected a finite tolerance of at least 0")
        if not 0 < self.atol < 0.5:
            raise ValueError(f"atol is {self.atol}, expected a tolerance within (0, 0.5)")

    @property
    def is_adaptive(self) -> bool:
        return True

    @property
    def order(self) -> int:
        return PAIRS[self.pair].order

    def forget(self, state: State[_Attempt | float]) -> State[_Attempt | float]:
        return state  # a step depends on earlier ones only by its first length

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[_Attempt | float]:
        rounding = 10 * torch.finfo(x.dtype).eps
        if max(self.rtol, self.atol) < rounding:
            raise ValueError(
                f"rtol and atol are {self.rtol} and {self.atol}, below the rounding of {x.dtype}: "
                f"raise one to {rounding:.1g}, or sample in float64"
            )
        return super().start(x, knots, noise)

    def advance(
        self, state: State[_Attempt | float], prediction: Prediction, noise: Noise
    ) -> State[_Attempt | float]:
        velocity = prediction.eps - prediction.x0
        if not isinstance(state.memory, _Attempt):
            return self._begin_step(state, prediction, velocity, state.memory)
        attempt = state.memory._replace(slopes=(*state.memory.slopes, velocity))
        if len(attempt.slopes) <= len(PAIRS[self.pair].rows):
            return self._to_next_stage(state, attempt)
        return self._finish_attempt(state, attempt, prediction)

    def _begin_step(
        self,
        state: State[_Attempt | float],
        prediction: Prediction,
        velocity: Tensor,
        length: float | None,
    ) -> State[_Attempt | float]:
        """Begin a step at a knot, or take the first-order step to an end less than `atol` away.

        Args:
            state: the state at the knot.
            prediction: x_0 and ε there.
            velocity: ε - x_0.
            length: |h| of the first step; None chooses it from the tolerance.
        """
        level, knot = state.level, state.remaining[0]
        a = _to_number(level)
        rest = self._target(knot) - a
        if rest == 0 or (rest > 0) != (_to_number(knot) > a):
            return state.at_next_knot(prediction.at(knot))
        h = _divide(rest, length or max(self.rtol, self.atol) ** (1 / self.order))
        attempt = _Attempt(state.x / (level.alpha + level.sigma), a, h, (velocity,))
        return self._to_next_stage(state, attempt)

    def _target(self, knot: Level) -> float:
        """The a at which the pair stops: the knot's, `atol` before an end, or the cleanest one."""
        a = _to_number(knot)
        a = a if is_interior(knot) else min(max(a, self.atol), 1 - self.atol)
        return max(a, _to_number(knot.schedule.cleanest)) if knot.is_beyond_training else a

    def _to_next_stage(
        self, state: State[_Attempt | float], attempt: _Attempt
    ) -> State[_Attempt | float]:
        """The state at which the attempt's next stage is evaluated."""
        pair, i, h = PAIRS[self.pair], len(attempt.slopes), attempt.h
        row = pair.rows[i - 1]
        z = attempt.z + sum(
            h * a_ij * k for a_ij, k in zip(row, attempt.slopes, strict=True) if a_ij
        )
        level = self._level(state.remaining[0], attempt.a + h * sum(row))
        return replace(state, x=(level.alpha + level.sigma) * z, level=level, memory=attempt)

    def _level(self, knot: Level, a: float) -> Level:
        """The level at a, or the knot itself if they differ only by rounding."""
        is_knot = is_interior(knot) and abs(a - _to_number(knot)) < MIN_STEP / 10
        return knot if is_knot else knot.schedule.at_blend(a)

    def _finish_attempt(
        self, state: State[_Attempt | float], attempt: _Attempt, prediction: Prediction
    ) -> State[_Attempt | float]:
        """Accept a step whose error is within the tolerance; otherwise repeat it with a shorter h.

        Args:
            state: the state at z', where the last stage was evaluated.
            attempt: the step with all its slopes.
            prediction: x_0 and ε at z'.
        """
        knot, (z, a, h, slopes), pair = state.remaining[0], attempt, PAIRS[self.pair]
        after = state.x / (state.level.alpha + state.level.sigma)
        error = sum(
            (h * e * k for e, k in zip(pair.error, slopes, strict=True)), torch.zeros_like(after)
        )
        size = self._relative_size(error, z, after)
        factor = (
            min(max(SAFETY * size ** (-1 / pair.order), MIN_FACTOR), MAX_FACTOR)
            if size > 0
            else MAX_FACTOR
        )
        length = abs(h * factor)
        target = self._target(knot)
        if size <= 1:
            z, a, slopes = after, a + h, slopes[-1:]
            if abs(target - a) < MIN_STEP / 10:
                x = state.x if target == _to_number(knot) else prediction.at(knot)
                return state.at_next_knot(x, length)
        elif length <= MIN_STEP:
            raise ValueError(
                f"{self} cannot meet its tolerance at a = {a:g}: raise rtol and atol, or check "
                "that the output of the network is finite"
            )
        return self._to_next_stage(state, _Attempt(z, a, _divide(target - a, length), slopes[:1]))

    def _relative_size(self, error: Tensor, before: Tensor, after: Tensor) -> float:
        """The greatest error of a sample in units of the tolerance; inf if it is not a number.

        Args:
            error: error of z', (B, *shape).
            before: z at the beginning of the step.
            after: z' at its end.
        """
        scale = self.atol + self.rtol * before.abs().maximum(after.abs())
        size = float((error / scale).flatten(1).square().mean(1).sqrt().max())
        return size if math.isfinite(size) else math.inf


def _divide(rest: float, length: float) -> float:
    """The step when `rest` is divided into equal steps no longer than `length`."""
    return rest / max(math.ceil(abs(rest) / length - 1e-9), 1)


def _to_number(level: Level) -> float:
    """a of a level that is the same for the whole batch."""
    return require_number(level.blend, "AdaptiveRungeKutta", "use another sampler")
