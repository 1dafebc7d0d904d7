"""Adaptive Runge-Kutta: an embedded pair on dz/da = ε - x_0, z = x/(α+σ), a = σ/(α+σ), with steps chosen by their error.

    k_1 = v(z, a),   k_i = v(z + h Σ_j a_ij k_j, a + c_i h),   z' = z + h Σ_i b_i k_i,   error = h Σ_i e_i k_i

The last stage of both pairs is asked at z' itself, so it begins the next step.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, interior
from diffcore.schedules import Level


class _Pair(NamedTuple):
    """Coefficients: the rows a_ij, the last one being b, and e = b less the weights of the lower order."""

    order: int
    rows: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(Fraction(word)) for word in text.split())


PAIRS = {
    "BogackiShampine": _Pair(  # 1989: 3(2), four stages
        3,
        (_floats("1/2"), _floats("0 3/4"), _floats("2/9 1/3 4/9")),
        _floats("-5/72 1/12 1/9 -1/8"),
    ),
    "DormandPrince": _Pair(  # 1980: 5(4), seven stages
        5,
        (
            _floats("1/5"),
            _floats("3/40 9/40"),
            _floats("44/45 -56/15 32/9"),
            _floats("19372/6561 -25360/2187 64448/6561 -212/729"),
            _floats("9017/3168 -355/33 46732/5247 49/176 -5103/18656"),
            _floats("35/384 0 500/1113 125/192 -2187/6784 11/84"),
        ),
        _floats("71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40"),
    ),
}
SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
LEAST = 1e-9
"""A step of a below this will not meet its tolerance: what is left of the error is rounding."""


class _Attempt(NamedTuple):
    """A step under way: from (z, a) by h, with the slopes found so far. At a knot the memory is the |h| to begin with."""

    z: Tensor
    a: float
    h: float
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True)
class AdaptiveRungeKutta(Sampler):
    """Steps of a as long as the root mean square of error / (atol + rtol max(|z|, |z'|)) is at most 1 in every row.

    It lands on every knot and asks afresh there: give it few (one step is enough). Evaluations are counted as they happen.
    A row that is alone in its batch chooses its own steps; in a batch the steps are those of the worst row, so a sample
    depends on what is beside it, within the tolerance. The decisions read the sample: this sampler alone synchronises with
    the device. It needs no exception at α = 0; the network is not asked at a knot that is reached at α = 0 or σ = 0, and the
    last `atol` of a before it is the first-order step.

    Args:
        pair: BogackiShampine, of order 3, or DormandPrince, of order 5.
        rtol: tolerance relative to |z|, of one step.
        atol: absolute tolerance of z, of one step.
    """

    pair: Literal["BogackiShampine", "DormandPrince"] = "DormandPrince"
    rtol: float = 1e-3
    atol: float = 1e-3
    adaptive = True

    def __post_init__(self) -> None:
        if self.pair not in PAIRS:
            raise ValueError(f"pair is {self.pair!r}, expected one of {', '.join(PAIRS)}")
        if not 0 <= self.rtol < math.inf:
            raise ValueError(f"rtol is {self.rtol}, expected a finite tolerance of at least 0")
        if not 0 < self.atol < 0.5:
            raise ValueError(f"atol is {self.atol}, expected a tolerance within (0, 0.5)")

    def forget(self, state: State) -> State:
        return state  # a step sees nothing of those before but their size

    @property
    def order(self) -> int:
        return PAIRS[self.pair].order

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        rounding = 10 * torch.finfo(x.dtype).eps
        if max(self.rtol, self.atol) < rounding:
            raise ValueError(
                f"rtol and atol are {self.rtol} and {self.atol}, below the rounding of {x.dtype}: "
                f"raise one to {rounding:.1g}, or sample in float64"
            )
        return super().start(x, knots, noise)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        velocity = prediction.eps - prediction.x0
        if not isinstance(state.memory, _Attempt):
            return self._begun(state, prediction, velocity)
        attempt = state.memory._replace(slopes=(*state.memory.slopes, velocity))
        if len(attempt.slopes) <= len(PAIRS[self.pair].rows):
            return self._ask(state, attempt)
        return self._judged(state, attempt, prediction)

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        raise ValueError(
            f"{self} asks as often as its tolerance needs: run it and read the evaluations of the samples"
        )

    def _begun(self, state: State, prediction: Prediction, velocity: Tensor) -> State:
        """The first stage from a knot, or the first-order step where the next one is an end less than `atol` away."""
        level, knot = state.level, state.left[0]
        a = _number(level)
        left = self._target(knot) - a
        if left == 0 or (left > 0) != (_number(knot) > a):
            return state.reached(prediction.at(knot))
        h = _divided(left, state.memory or max(self.rtol, self.atol) ** (1 / self.order))
        return self._ask(state, _Attempt(state.x / (level.alpha + level.sigma), a, h, (velocity,)))

    def _target(self, knot: Level) -> float:
        """A where the pair stops: at the knot, or `atol` before an end."""
        a = _number(knot)
        return a if interior(knot) else min(max(a, self.atol), 1 - self.atol)

    def _ask(self, state: State, attempt: _Attempt) -> State:
        """The state that asks for the next stage."""
        pair, i, h = PAIRS[self.pair], len(attempt.slopes), attempt.h
        row = pair.rows[i - 1]
        z = attempt.z + sum(
            h * a_ij * k for a_ij, k in zip(row, attempt.slopes, strict=True) if a_ij
        )
        level = self._level(state.left[0], attempt.a + h * sum(row))
        return replace(state, x=(level.alpha + level.sigma) * z, level=level, memory=attempt)

    def _level(self, knot: Level, a: float) -> Level:
        """The level at a; the knot itself where rounding is all that differs."""
        return (
            knot
            if interior(knot) and abs(a - _number(knot)) < LEAST / 10
            else knot.schedule.at_blend(a)
        )

    def _judged(self, state: State, attempt: _Attempt, prediction: Prediction) -> State:
        """On to the next step if this one's error is within the tolerance, else once more and shorter."""
        knot, (z, a, h, slopes), pair = state.left[0], attempt, PAIRS[self.pair]
        after = state.x / (state.level.alpha + state.level.sigma)
        error = sum(
            (h * e * k for e, k in zip(pair.error, slopes, strict=True)), torch.zeros_like(after)
        )
        size = self._size(error, z, after)
        wanted = (
            h * min(max(SAFETY * size ** (-1 / pair.order), SHRINK), GROW) if size > 0 else h * GROW
        )
        target = self._target(knot)
        if size <= 1:
            z, a, slopes = after, a + h, slopes[-1:]
            if abs(target - a) < LEAST / 10:
                x = state.x if interior(knot) else prediction.at(knot)
                return state.reached(x, abs(wanted))
        elif not abs(wanted) > LEAST:  # also NaN
            raise ValueError(
                f"{self} cannot meet its tolerance at a = {a:g}: raise rtol and atol, or see whether the network is finite"
            )
        return self._ask(state, _Attempt(z, a, _divided(target - a, abs(wanted)), slopes[:1]))

    def _size(self, error: Tensor, before: Tensor, after: Tensor) -> float:
        """The worst row's error in units of the tolerance; 1/0 where it is not a number, so that the step shrinks."""
        scale = self.atol + self.rtol * before.abs().maximum(after.abs())
        size = float((error / scale).flatten(1).square().mean(1).sqrt().max())
        return size if math.isfinite(size) else math.inf


def _divided(left: float, h: float) -> float:
    """What is left in equal steps of at most h."""
    return left / max(math.ceil(abs(left) / h - 1e-9), 1)


def _number(level: Level) -> float:
    if isinstance(level.blend, Tensor):
        raise TypeError(
            "adaptive steps are for a whole batch at one level, not for a map of levels: use another sampler"
        )
    return level.blend
