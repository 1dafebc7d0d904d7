"""Samplers that return to noisier levels: an inner sampler integrates over segments of levels, and
noise is added between them. Restart adds it several times within the same interval.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
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
    require_number,
)
from diffcore.samplers.blending import AlphaBlending

__all__ = ["Restart", "SegmentPosition", "SegmentSampler"]

KNOT_TOLERANCE = 1e-9
"""Difference of λ below which a knot counts as u_min."""

RHO = 7
"""ρ of Karras' spacing of the levels within an interval."""


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


@dataclass(frozen=True)
class Restart(SegmentSampler):
    """Return K times from u_min to u_max by y + √(u_max² - u_min²) z, and integrate with `inner`.

    Here y = x/α and u = σ/α. The added noise turns the marginal at u_min into the one at u_max
    exactly, and contracts the errors accumulated so far. The inner sampler should therefore add no
    noise. Levels within an interval have Karras' spacing (ρ = 7). u_min becomes a knot if it is not
    one already. The official code instead moves u_min to the nearest knot, and its number of levels
    in an interval is `steps` + 1.

    Xu et al. 2023 (2306.14878, Algorithms 1 and 2).

    Args:
        inner: sampler that integrates between the jumps; its memory is empty after each jump.
        intervals: one (u_min, u_max, steps, K) per interval: σ/α at its two ends, the steps from
            u_max to u_min, and the number of repetitions K. Intervals do not overlap, and lie
            within the levels of the run. The default is the paper's for CIFAR-10, where data has
            standard deviation 0.5.
    """

    inner: Sampler = AlphaBlending(2)
    intervals: tuple[tuple[float, float, int, int], ...] = ((0.06, 0.3, 2, 2),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(tuple(interval) for interval in self.intervals))
        for interval in self.intervals:
            low, high, steps, repeats = interval
            if not (0 < low < high < math.inf and steps >= 1 and repeats >= 1):
                raise ValueError(
                    f"interval is {interval}, expected (u_min, u_max, steps, repeats) with "
                    f"0 < u_min < u_max < inf and at least 1 step and 1 repeat"
                )
        for below, above in pairwise(sorted(self.intervals)):
            if above[0] < below[1]:
                raise ValueError(
                    f"the intervals {below} and {above} overlap: choose u_min of the noisier one "
                    f"at or above {below[1]}, u_max of the other"
                )

    def segments(self, knots: Knots) -> list[Knots]:
        segments = [knots]
        for interval in sorted(self.intervals, reverse=True):
            segments += _split(segments.pop(), *interval)
        return [segment for segment in segments if len(segment) > 1]

    def _inner_noise(self, noise: Noise, position: SegmentPosition) -> Noise:
        return noise.branch(2 * len(position.later) + 1)

    def _jump_noise(self, noise: Noise, position: SegmentPosition) -> Tensor:
        inner, start = position.inner, position.later[0][0]
        return noise.branch(2 * len(position.later)).between(inner.level, start, inner.step)

    def _start_segment(self, x: Tensor, segment: Knots, noise: Noise, step: int) -> State:
        return replace(super()._start_segment(x, segment, noise, step), step=step)


def _split(knots: Knots, low: float, high: float, steps: int, repeats: int) -> list[Knots]:
    """Split a segment into the part down to `low`, the repeats from `high` to `low`, and the rest.

    Args:
        knots: the segment.
        low: u_min.
        high: u_max.
        steps: steps of each repeat.
        repeats: K.

    Returns:
        1 + repeats + 1 segments; the first and last may have a single knot.

    Raises:
        ValueError: The interval is not within the segment.
        TypeError: The knots are maps of levels.
    """
    schedule = knots[0].schedule
    for knot in knots:
        require_number(knot.logsnr, "Restart", "use its inner sampler alone")
    bottom, top = (-2 * math.log(u) for u in (low, high))
    end = schedule.at(bottom)
    is_within = knots[0].logsnr <= top < bottom <= knots[-1].logsnr
    if not is_within:
        raise ValueError(
            f"the interval of σ/α from {low} to {high} is not within the run, which goes from "
            f"{knots[0].ratio:g} to {knots[-1].ratio:g}: remove the interval, or choose knots "
            "whose noise decreases from above it to below it"
        )
    if end.is_beyond_training:
        raise ValueError(
            f"the interval of σ/α from {low} to {high} ends beyond the cleanest level of training, "
            f"{schedule.cleanest.ratio:g}: choose u_min above it"
        )
    ratios = [
        (high ** (1 / RHO) + i / steps * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
        for i in range(1, steps)
    ]
    repeat = (schedule.at(top), *(schedule.at(-2 * math.log(u)) for u in ratios), end)
    before = tuple(knot for knot in knots if knot.logsnr < bottom - KNOT_TOLERANCE)
    after = tuple(knot for knot in knots if knot.logsnr > bottom + KNOT_TOLERANCE)
    return [(*before, end), *[repeat] * repeats, (end, *after)]
