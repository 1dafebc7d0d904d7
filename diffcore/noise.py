"""Keyed randomness: every random number is a pure function of (seed, stream, position, element).

    key = the 64 bits of the seed;  counter = (element // 4, stream, position's low and high 32 bits)
    words = Philox4x32-10(key, counter);  normals = Box-Muller on (word + ½) 2^-32

so a resumed run, another number of ranks or workers, another accumulation, other seeds beside it give the same numbers.
Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Integers are exact on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffcore.prediction import edm_norm
from diffcore.schedules import Level

Word = TypeVar("Word", int, Tensor, "np.ndarray[Any, np.dtype[np.int64]]")
M32 = 0xFFFFFFFF
ROUNDS = 10


class Stream(IntEnum):
    """What a number is for: equal seeds and positions in two streams are independent. Values are part of a run."""

    ORDER = 0
    LEVEL = 1
    NOISE = 2
    DROPOUT = 3
    AUGMENT = 4
    MODEL = 5
    START = 6
    STEP = 7
    ORACLE = 8
    PERTURBATION = 20
    OFFSET = 21


def philox(key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 on Python integers, or on int64 arrays that hold 32-bit words and broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 products wrap, but their 32-bit halves are right
        c0, c1, c2, c3 = ((p1 >> 32) & M32) ^ c1 ^ k0, p1 & M32, ((p0 >> 32) & M32) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def words(
    seed: int | Tensor, stream: Stream, position: int | Tensor, count: int, device: torch.device | None = None
) -> Tensor:
    """(rows, count) 32-bit words as int64; seed and position are ints, or int64 tensors of shape (rows,)."""
    rows = torch.broadcast_tensors(torch.as_tensor(seed), torch.as_tensor(position))
    key, place = (value.reshape(-1, 1).to(device, torch.int64) for value in rows)
    element = torch.arange((count + 3) // 4, device=device)
    counter = (element, torch.full_like(element, int(stream)), place & M32, (place >> 32) & M32)
    if (
        element.device.type == "cpu"
    ):  # the same integers by numpy: a tenth of the overhead of torch's 100 small operations
        block = philox(_numpy(key & M32, (key >> 32) & M32), _numpy(*counter))
        return torch.from_numpy(np.stack(np.broadcast_arrays(*block), -1)).flatten(1)[:, :count]
    return torch.stack(torch.broadcast_tensors(*philox((key & M32, (key >> 32) & M32), counter)), -1).flatten(1)[
        :, :count
    ]


def _numpy(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.numpy() for tensor in tensors)


def uniform(seed: int | Tensor, stream: Stream, position: int | Tensor, count: int = 1) -> Tensor:
    """(rows, count) float64 numbers of the open interval (0, 1), 52 random bits each, on the host."""
    high, low = words(seed, stream, position, 2 * count).unflatten(1, (count, 2)).unbind(-1)
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def normal(
    seed: int | Tensor,
    stream: Stream,
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(rows, *shape) standard normal numbers; the transform runs in float64, so devices agree after rounding."""
    count = math.prod(shape)
    if device is not None and device.type == "mps":  # has no float64
        return normal(seed, stream, position, shape, None, dtype).to(device)
    u = (words(seed, stream, position, count + count % 2, device).double() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :count]
    return values.to(dtype).unflatten(1, tuple(shape)) if shape else values.to(dtype).squeeze(1)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """A random order of range(size), a function of (seed, epoch)."""
    return uniform(seed, Stream.ORDER, epoch, size)[0].argsort(stable=True)


def derived(seed: int, stream: Stream, position: int) -> int:
    """A 32-bit seed for a generator that is not ours (a network's initial weights, its dropout)."""
    return philox((seed & M32, seed >> 32 & M32), (0, int(stream), position & M32, position >> 32 & M32))[0]


@dataclass(frozen=True)
class Noise:
    """The noise of one sampling run: a row per seed, each row a function of its own seed and the step alone.

    Args:
        seeds: one a row, 64-bit.
        shape: of one row.
        device: where the noise is made.
        dtype: of the noise.
    """

    seeds: Tensor
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def start(self) -> Tensor:
        """The noise that a run starts from."""
        return normal(self.seeds, Stream.START, 0, self.shape, self.device, self.dtype)

    def step(self, index: int) -> Tensor:
        """The noise of step `index`."""
        return normal(self.seeds, Stream.STEP, index, self.shape, self.device, self.dtype)

    def first_sample(self, level: Level, sigma_data: float) -> Tensor:
        """√(α² s² + σ²) z: x at the first level, when nothing is known of x_0 but its standard deviation s."""
        return edm_norm(level, sigma_data) * self.start()
