"""Samplers that return to noisier levels: an inner sampler integrates over segments of levels, and
noise is added between them.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import (
    Knots,
    Sampler,
    SamplerWrapper,
    State,
    is_noisier,
    raise_noise,
)

__all__ = ["SegmentPosition", "SegmentSampler"]


class SegmentPosition(NamedTuple):
    """The progress of a `SegmentSampler`.

    Args:
        inner: state of the inner sampler within the current segment.
        finished: number of segments finished.
        later: the segments that follow the current one.
    """

    inner: State
    finished: int
    later: tuple[Knots, ...]


@dataclass(frozen=True)
class SegmentSampler(SamplerWrapper[SegmentPosition]):
    """Integrates with `inner` over one segment of levels after another.

    Where the next segment begins at a noisier level than the last one ended at, noise is added:
    x ← (α'/α) x + √(σ'² - (σ α'/α)²) z. The inner sampler starts each segment without memory.
    Subclasses define the segments and the key of each noise.

    Args:
        inner: the sampler that integrates within a segment.
    """

    inner: Sampler

    @abstractmethod
    def segments(self, knots: Knots) -> list[Knots]:
        """The segments between which the sampler jumps.

        Args:
            knots: levels between which the sampler steps.

        Returns:
            Knots of each segment, at least two, in order.
        """

    @abstractmethod
    def _inner_noise(self, noise: Noise, position: SegmentPosition) -> Noise:
        """The noise of the inner sampler in the current segment."""

    @abstractmethod
    def _jump_noise(self, noise: Noise, position: SegmentPosition) -> Tensor:
        """z of the jump from the end of the current segment to the beginning of the next one."""

    def _at_knot(self, x: Tensor, position: SegmentPosition, noise: Noise) -> Tensor:
        """x at a knot that the inner sampler has reached, modified for the next evaluation."""
        return x

    def _start_segment(self, x: Tensor, segment: Knots, noise: Noise, step: int) -> State:
        """The state of the inner sampler at the beginning of a segment, after `step` steps."""
        return self.inner.start(x, segment, noise)

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[SegmentPosition]:
        first, *later = self.segments(knots)
        position = SegmentPosition(State(x, first[0], first[1:]), 0, tuple(later))
        return _outer_state(self._enter_segment(x, first, position, noise, 0), 0)

    def advance(
        self, state: State[SegmentPosition], prediction: Prediction, noise: Noise
    ) -> State[SegmentPosition]:
        position = state.require_memory()
        before = position.inner
        inner = self.inner.advance(before, prediction, self._inner_noise(noise, position))
        position = position._replace(inner=inner)
        has_passed = len(inner.remaining) < len(before.remaining)
        if has_passed:
            x = self._at_knot(inner.x, position, noise)
            position = position._replace(inner=replace(inner, x=x))
        step = state.step + has_passed
        if position.inner.done and position.later:
            position = self._next_segment(position, noise, step)
        return _outer_state(position, step)

    def _next_segment(self, position: SegmentPosition, noise: Noise, step: int) -> SegmentPosition:
        """The position at the beginning of the next segment, after the jump has added noise."""
        (segment, *later), x = position.later, position.inner.x
        level = position.inner.level
        if is_noisier(segment[0], level):
            x = raise_noise(x, level, segment[0], self._jump_noise(noise, position))
        position = SegmentPosition(position.inner, position.finished + 1, tuple(later))
        return self._enter_segment(x, segment, position, noise, step)

    def _enter_segment(
        self, x: Tensor, segment: Knots, position: SegmentPosition, noise: Noise, step: int
    ) -> SegmentPosition:
        inner_noise = self._inner_noise(noise, position)
        return position._replace(inner=self._start_segment(x, segment, inner_noise, step))

    def forget(self, state: State[SegmentPosition]) -> State[SegmentPosition]:
        position = state.require_memory()
        return replace(state, memory=position._replace(inner=self.inner.forget(position.inner)))

    def uses_guidance(self, state: State[SegmentPosition]) -> bool:
        return self.inner.uses_guidance(state.require_memory().inner)


def _outer_state(position: SegmentPosition, step: int) -> State[SegmentPosition]:
    """The state of the outer sampler; its remaining knots are those of all remaining segments."""
    inner = position.inner
    later = tuple(knot for segment in position.later for knot in segment[1:])
    return State(inner.x, inner.level, inner.remaining + later, step, position)
