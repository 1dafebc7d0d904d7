"""Restart sampling: noise is added again, and the same interval of levels is integrated several
times.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.samplers.base import Knots, Sampler, State, require_number
from diffcore.samplers.blending import AlphaBlending
from diffcore.samplers.segments import SegmentPosition, SegmentSampler

__all__ = ["Restart"]

KNOT_TOLERANCE = 1e-9
"""Difference of λ below which a knot counts as u_min."""

RHO = 7
"""ρ of Karras' spacing of the levels within an interval."""


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
