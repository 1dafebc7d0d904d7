"""Multistep coefficients that were tuned to one network, for one number of steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.adams import AdamsBashforth
from diffcore.samplers.base import Knots, Sampler, SamplerWrapper, State, multiply
from diffcore.schedules import Level

__all__ = ["Rows", "TunedMultistep"]

Rows = tuple[tuple[float, ...], ...]
"""Coefficients of each step after the first, those of the newest difference first."""


class _TunedMemory(NamedTuple):
    """Memory of `TunedMultistep`.

    Args:
        inner: memory of the inner sampler.
        start: level at the beginning of the current step.
        is_tuned: whether the run has the number of steps that the coefficients were tuned for.
        past: earlier predictions, the newest first.
    """

    inner: Any
    start: Level
    is_tuned: bool
    past: tuple[Prediction, ...] = ()


@dataclass(frozen=True)
class TunedMultistep(SamplerWrapper[_TunedMemory]):
    """Add multiples of the differences of all earlier predictions to each step of `inner`.

        x_s = step of inner + κ Σ_{j≥1} [b_ij (x_0,j-1 - x_0,j) + c_ij (ε_j-1 - ε_j)]
        κ = (α_s + σ_s) (a_t - a_s),  a = σ/(α+σ)

    In step i from t to s, the predictions are counted backwards from the newest one, j = 0. Each
    linear multistep method of x_0 and ε is this sum, with correctors that need no evaluation of
    their own: inner is the method from which the coefficients start. The differences vanish if x_0
    and ε are constant, so that such a flow stays exact. Without coefficients, and in runs of
    another number of steps, the steps are those of inner.

    `diffcore tune` finds the coefficients together with the knots. To solve for all coefficients of
    a multistep method by the ends of the flow is the idea of Frankel et al. 2025 (S4S, 2502.17423);
    Shaul et al. 2024 (2403.01329) do so for flows.

    Args:
        inner: the sampler to whose steps the differences are added.
        x0: n - 1 rows b_i, of the steps after the first; row i has at most i coefficients.
        eps: n - 1 rows c_i.
        guidance: guidance rule that they were tuned for, as text; no effect on the steps.

    Example:
        >>> from diffcore.samplers import AdamsBashforth
        >>> TunedMultistep(AdamsBashforth.flow(2), x0=((0.1,),), eps=((0.0,),)).steps
        2
    """

    inner: Sampler = AdamsBashforth.flow(2)
    x0: Rows = ()
    eps: Rows = ()
    guidance: str = ""

    def __post_init__(self) -> None:
        for name in ("x0", "eps"):
            rows = tuple(tuple(float(b) for b in row) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
        if isinstance(self.inner, TunedMultistep):
            raise ValueError(f"inner is {self.inner}, expected a sampler that is not tuned")
        if len(self.x0) != len(self.eps):
            raise ValueError(
                f"x0 and eps have {len(self.x0)} and {len(self.eps)} rows, expected one for each "
                "step after the first in both"
            )

    @property
    def steps(self) -> int:
        """The number of steps n that the coefficients were tuned for."""
        return len(self.x0) + 1

    @property
    def is_direct(self) -> bool:
        return False

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[_TunedMemory]:
        state = self.inner.start(x, knots, noise)
        is_tuned = len(knots) - 1 == self.steps
        return replace(state, memory=_TunedMemory(state.memory, knots[0], is_tuned))

    def advance(
        self, state: State[_TunedMemory], prediction: Prediction, noise: Noise
    ) -> State[_TunedMemory]:
        memory = state.require_memory()
        after = self.inner.advance(replace(state, memory=memory.inner), prediction, noise)
        past = (prediction, *memory.past) if memory.is_tuned else ()
        memory = memory._replace(inner=after.memory, past=past[: self._depth])
        if after.step == state.step:  # within a step
            return replace(after, memory=memory)
        x, row = after.x, state.step - 1
        if past and row >= 0:
            x = self._corrected(x, past, memory.start, after.level, row)
        return replace(after, x=x, memory=memory._replace(start=after.level))

    @property
    def _depth(self) -> int:
        """The number of earlier predictions that the coefficients multiply."""
        return max(map(len, (*self.x0, *self.eps, ())))

    def _corrected(
        self, x: Tensor, past: Sequence[Prediction], t: Level, s: Level, row: int
    ) -> Tensor:
        """x with the tuned multiples of the differences of the predictions.

        Args:
            x: (B, *shape) end of the step of inner.
            past: predictions, the newest first.
            t: level at the beginning of the step.
            s: level at its end.
            row: index of the row of coefficients.
        """
        scale = (s.alpha + s.sigma) * (t.blend - s.blend)
        differences = [(a.x0 - b.x0, a.eps - b.eps) for a, b in pairwise(past)]
        for index, rows in enumerate((self.x0, self.eps)):
            for b, difference in zip(rows[row], differences, strict=False):
                x = x + multiply(scale * b, difference[index]) if b else x
        return x

    def forget(self, state: State[_TunedMemory]) -> State[_TunedMemory]:
        memory = state.require_memory()
        inner = self.inner.forget(replace(state, memory=memory.inner))
        return replace(state, memory=memory._replace(inner=inner.memory, past=()))

    def uses_guidance(self, state: State[_TunedMemory]) -> bool:
        return self.inner.uses_guidance(replace(state, memory=state.require_memory().inner))
