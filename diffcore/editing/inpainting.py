"""Inpainting by replacement: at each knot the known pixels are replaced by the noisy image."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import Knots, Sampler, SegmentSampler, State
from diffcore.samplers.base import is_clean
from diffcore.samplers.segments import SegmentPosition
from diffcore.schedules import Level, check_falling

__all__ = ["RePaint"]

INNER, KNOWN, JUMP = range(3)
"""Uses of noise within a segment, with independent noise: inner sampler, known pixels, jump."""


@dataclass(frozen=True, eq=False)
class RePaint(SegmentSampler):
    """x ← mask (α x_known + σ z) + (1 - mask) x at each knot, with jumps back to noisier knots.

    A jump is x ← (α'/α) x + √(σ'² - (α'/α)² σ²) z. From each knot `jump` steps apart the sampler
    goes back by `jump` steps, resamplings - 1 times, so that the unknown pixels become consistent
    with the known ones. resamplings = 1 is replacement alone. z is fresh each time; with a path
    (see Noise), the z of the known pixels between two jumps are values of one path. If the last
    knot is clean, the result contains the known pixels exactly.

    Any sampler may integrate between jumps; the paper's is DDIM(1). It starts without memory after
    each jump. Within a segment, a multistep sampler uses predictions from before the last
    replacement, and a stage between two knots has no replacement.

    Lugmayr et al. 2022 (2201.09865, Algorithm 1 and its jumps).

    Args:
        inner: sampler between two jumps.
        image: x_0 at the known pixels, (*shape), or (B, *shape) with as many images as samples are
            integrated together (`batch_size` of `sample`).
        mask: booleans that broadcast against the image, True where it is known.
        jump: number of steps of a jump, j; the paper has 10 of 250.
        resamplings: number of passes over the steps of each jump, r; 1 has no jumps.
    """

    inner: Sampler
    image: Tensor
    mask: Tensor
    jump: int = 10
    resamplings: int = 10
    order = 1

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask holds {self.mask.dtype}, expected booleans, True where the image is known"
            )
        if torch.broadcast_shapes(self.mask.shape, self.image.shape) != self.image.shape:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, expected one that broadcasts to "
                f"{tuple(self.image.shape)}, the shape of the image"
            )
        if self.jump < 1 or self.resamplings < 1:
            raise ValueError(
                f"jump and resamplings are {self.jump} and {self.resamplings}, expected at least 1 "
                "of each"
            )

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[SegmentPosition]:
        check_falling(knots)
        if len(x) and self.image.shape not in (x.shape, x.shape[1:]):
            raise ValueError(
                f"image has shape {tuple(self.image.shape)}, expected {tuple(x.shape[1:])}, the "
                f"same image for all samples, or {tuple(x.shape)}, one for each sample of the batch"
            )
        x = self._replace_known(x, knots[0], _branch(noise, 0, KNOWN).start())
        return super().start(x, knots, noise)

    def segments(self, knots: Knots) -> list[Knots]:
        segments, begin = [], 0
        last = len(knots) - 2  # the last noisy knot: there is no jump from the clean one
        for end in range(self.jump + last % self.jump, last + 1, self.jump):
            for _ in range(self.resamplings - 1):
                segments.append(knots[begin : end + 1])
                begin = end - self.jump
        return [*segments, knots[begin:]]

    def _inner_noise(self, noise: Noise, position: SegmentPosition) -> Noise:
        return _branch(noise, position.finished, INNER)

    def _jump_noise(self, noise: Noise, position: SegmentPosition) -> Tensor:
        start = position.later[0][0]
        return _branch(noise, position.finished, JUMP).between(position.inner.level, start, 0)

    def _at_knot(self, x: Tensor, position: SegmentPosition, noise: Noise) -> Tensor:
        level = position.inner.level
        z = torch.zeros_like(x)
        if not is_clean(level):
            pure_noise = level.schedule.at(-math.inf)
            known = _branch(noise, position.finished, KNOWN)
            z = known.between(pure_noise, level, position.inner.step)
        return self._replace_known(x, level, z)

    def _replace_known(self, x: Tensor, level: Level, z: Tensor) -> Tensor:
        """x with its known pixels replaced by the image at this level.

        Args:
            x: sample at the level, (B, *shape); a batch of 0 samples (a dry run) has no pixels to
                replace.
            level: noise level of x.
            z: standard normal noise, of the shape of x.
        """
        if not len(x):
            return x
        known = Prediction(self.image.to(x), z).at(level)
        return torch.where(self.mask.to(x.device), known, x)


def _branch(noise: Noise, segment: int, use: int) -> Noise:
    """Noise that is independent for each segment and use.

    Args:
        noise: noise of the run.
        segment: number of the segment, from 0.
        use: INNER, KNOWN or JUMP.
    """
    return noise.branch(3 * segment + use)
