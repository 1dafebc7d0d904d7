"""The noise of sampling: one independent, keyed sequence of standard normals for each seed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffcore.core.brownian_path import increment_coefficients
from diffcore.core.prediction import edm_norm
from diffcore.core.random import Stream, normal
from diffcore.schedules import Level

__all__ = ["Noise"]

DIGIT = 12
"""Bits of one digit of a channel. The digits of a branch are 1 to 4094, or ESCAPE and two more."""

ESCAPE = 2**DIGIT - 1
"""Digit that two more digits follow, which hold a larger index."""

BLOCK = 2**16
"""Maximum number of normals of a Brownian path that are drawn in one call."""


@dataclass(frozen=True)
class Noise:
    """The noise of one sampling trajectory per seed; it depends only on the seed and the step.

    With `path`, the noise of a step from level t to level s is the normalised increment of one
    Brownian motion of each seed over the clock e^λ = α²/σ²,

        z = (W(s) - W(t)) / √(e^λ_s - e^λ_t)

    It is independent from step to step, and a function of (seed, t, s): a finer grid with the same
    seed uses the same motion, and the samples converge as the number of steps grows. In this clock,
    steps of DDIM(1) compose exactly while x_0 is constant. A step draws about 2·DEPTH normals per
    element instead of one.

    Args:
        seeds: 64-bit seeds, an int64 tensor of shape (B,), one for each sample.
        shape: shape of one sample, channels first.
        device: device of the noise.
        dtype: dtype of the noise.
        path: True to take the noise of the steps from one Brownian motion; False to key it by the
            number of the step.
        channel: number of this noise among the independent noises of the same seeds; 0 is the first
            and `branch` gives the others.

    Example:
        >>> noise = Noise(torch.tensor([1, 2]), shape=(3, 8, 8))
        >>> noise.start().shape
        torch.Size([2, 3, 8, 8])
        >>> torch.equal(noise.step(4)[1:], Noise(torch.tensor([2]), (3, 8, 8)).step(4))
        True
    """

    seeds: Tensor
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    path: bool = False
    channel: int = 0

    def start(self) -> Tensor:
        """Standard normal noise (B, *shape) for the first x of the trajectory."""
        return self._keyed_normal(self.seeds, Stream.START, 0)

    def step(self, index: int) -> Tensor:
        """Standard normal noise (B, *shape) of the step with number `index`, below 2^24."""
        return self._keyed_normal(self.seeds, Stream.STEP, index)

    def between(self, t: Level, s: Level, step: int) -> Tensor:
        """Standard normal noise (B, *shape) of the step from level t to level s.

        Args:
            t: level at which the step begins.
            s: level at which the step ends.
            step: number of the step, which is the key of the noise unless `path` is set.

        Raises:
            ValueError: `path` is set, and a level is clean or the levels are too close. Use
                path=False.
        """
        if not self.path:
            return self.step(step)
        coefficients = increment_coefficients(t, s)
        normals = self._normals(list(coefficients))
        return sum(
            (c * z for c, z in zip(coefficients.values(), normals, strict=True)),
            torch.zeros((), dtype=self.dtype),
        )

    def branch(self, index: int) -> "Noise":
        """An independent noise of the same seeds, for a step that needs several normals.

        Args:
            index: number of the branch, from 0 to 2^24 - 1. A channel has five digits of 12 bits;
                a branch adds one digit, or three if its index is above 4093.

        Returns:
            The noise of branch `index`, with the same shape, device and dtype.

        Raises:
            ValueError: the index is out of range, or the branches are nested too deep. Use fewer
                branches.
        """
        if index < ESCAPE - 1:
            channel = (self.channel << DIGIT) + index + 1
        else:
            channel = (((self.channel << DIGIT) + ESCAPE) << 2 * DIGIT) + index
        if not 0 <= index < 2 ** (2 * DIGIT) or channel >= 2 ** (5 * DIGIT):
            raise ValueError(
                f"branch {index} of channel {self.channel}, expected an index from 0 to "
                f"{2 ** (2 * DIGIT) - 1}, and at most 5 nested branches, where one with an index "
                f"above {ESCAPE - 2} counts as 3: use fewer branches"
            )
        return replace(self, channel=channel)

    def first_sample(self, level: Level, sigma_data: float) -> Tensor:
        """√(α² s² + σ²) z of shape (B, *shape): the first x, with the standard deviation of noisy
        data.

        Args:
            level: first level of the grid.
            sigma_data: standard deviation s of the data.
        """
        z, scale = self.start(), edm_norm(level, sigma_data)
        return (scale.to(z) if isinstance(scale, Tensor) else scale) * z

    def _normals(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the normals (B, *shape) at each index, drawn in blocks that bound the memory."""
        batch = len(self.seeds)
        block = max(1, BLOCK // max(1, batch * math.prod(self.shape)))
        for first in range(0, len(indices), block):
            nodes = torch.tensor(indices[first : first + block])
            seeds, nodes = self.seeds.repeat(len(nodes)), nodes.repeat_interleave(batch)
            yield from self._keyed_normal(seeds, Stream.PATH, nodes).unflatten(0, (-1, batch))

    def _keyed_normal(self, seeds: Tensor, stream: Stream, index: int | Tensor) -> Tensor:
        """Normals (len(seeds), *shape) of a step or node of this channel.

        The low 24 bits of the position hold the index, the 36 bits above them the three low digits
        of the channel; the other two digits are in the word of the stream, above its 8 bits.
        """
        high, low = divmod(self.channel, 2 ** (3 * DIGIT))
        position = (low << 24) + index
        word = int(stream) + (high << 8)
        return normal(seeds, word, position, self.shape, self.device, self.dtype)
