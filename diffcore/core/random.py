"""Keyed randomness: every random number is a pure function of (seed, stream, position, element).

    key = the 64 bits of the seed
    counter = (element // 4, stream, position's low and high 32 bits)
    words = Philox4x32-10(key, counter)
    normals = Box-Muller on (word + ½) 2^-32

The numbers therefore do not change when training is resumed, when the number of ranks, data workers
or accumulated micro-batches changes, or when the other seeds of a batch change.
Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". It consists of
integer operations, so its words are equal on every device.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stream", "derive_seed", "normal", "permutation", "philox", "uniform", "words"]

Word = TypeVar("Word", int, Tensor, "np.ndarray[Any, np.dtype[np.int64]]")
MASK32 = 0xFFFFFFFF
ROUNDS = 10


class Stream(IntEnum):
    """The purpose of a random number; numbers of different streams are independent.

    The values are part of the key, so changing one changes the results of every seed.

    Args:
        value: number of the stream, part of the Philox counter.
    """

    ORDER = 0
    LEVEL = 1
    NOISE = 2
    DROPOUT = 3
    AUGMENT = 4
    MODEL = 5
    START = 6
    STEP = 7
    ORACLE = 8
    PATH = 9
    PERTURBATION = 20
    OFFSET = 21
    LATENT = 22
    VALIDATION = 23
    BUCKET = 30
    CROP = 31
    CAPTION = 32
    SHARD = 33
    MASK = 34
    CONDITION = 40
    LEVEL_LATENT = 41
    ITEM = 50
    ITEM_NOISE = 51
    EVALUATION = 60
    TRACE = 61
    DEQUANTISATION = 62
    BOUND = 63
    NETWORK = 70
    END_LEVEL = 72
    PAIR = 80
    PAIR_SEED = 81
    ROLLOUT = 90
    ROLLOUT_STEP = 91
    GUIDANCE_SCALE = 92
    INPUT_SEED = 93
    INPUT_NOISE = 94


def philox(
    key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Four 32-bit words of Philox4x32-10 for a key of two words and a counter of four.

    Args:
        key: two words, each a Python integer or an int64 array or tensor of 32-bit values.
        counter: four words of the same type, which broadcast against the key.

    Returns:
        Four words of the same type, of the broadcast shape.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # The int64 products may overflow, but their low and high 32-bit halves are correct.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def words(
    seed: int | Tensor,
    stream: int,
    position: int | Tensor,
    count: int,
    device: torch.device | None = None,
) -> Tensor:
    """Random 32-bit words, an int64 tensor of shape (B, count).

    Args:
        seed: 64-bit seed, an integer or an int64 tensor of shape (B,).
        stream: purpose of the numbers, a `Stream` or another 32-bit word.
        position: 64-bit position in the stream, an integer or an int64 tensor of shape (B,).
        count: number of words for each seed and position.
        device: device of the result; the host by default.
    """
    pairs = torch.broadcast_tensors(torch.as_tensor(seed), torch.as_tensor(position))
    key, index = (value.reshape(-1, 1).to(device, torch.int64) for value in pairs)
    element = torch.arange((count + 3) // 4, device=device)
    stream_word = torch.full_like(element, int(stream))
    counter = (element, stream_word, index & MASK32, (index >> 32) & MASK32)
    if element.device.type == "cpu":
        # numpy computes the same integers with a tenth of the overhead of torch's 100 operations.
        block = philox(_numpy(key & MASK32, (key >> 32) & MASK32), _numpy(*counter))
        return torch.from_numpy(np.stack(np.broadcast_arrays(*block), -1)).flatten(1)[:, :count]
    return torch.stack(
        torch.broadcast_tensors(*philox((key & MASK32, (key >> 32) & MASK32), counter)), -1
    ).flatten(1)[:, :count]


def _numpy(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors as numpy arrays that share their memory."""
    return tuple(tensor.numpy() for tensor in tensors)


def uniform(seed: int | Tensor, stream: Stream, position: int | Tensor, count: int = 1) -> Tensor:
    """Uniform float64 numbers in the open interval (0, 1), of shape (B, count), on the host.

    Each has 52 random bits.

    Args:
        seed: 64-bit seed, an integer or an int64 tensor of shape (B,).
        stream: purpose of the numbers.
        position: 64-bit position in the stream, an integer or an int64 tensor of shape (B,).
        count: number of values for each seed and position.
    """
    high, low = words(seed, stream, position, 2 * count).unflatten(1, (count, 2)).unbind(-1)
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def normal(
    seed: int | Tensor,
    stream: int,
    position: int | Tensor,
    shape: Sequence[int],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of shape (B, *shape), equal on all devices after rounding.

    The Box-Muller transform runs in float64, and its result is rounded to `dtype`.

    Args:
        seed: 64-bit seed, an integer or an int64 tensor of shape (B,).
        stream: purpose of the numbers, a `Stream` or another 32-bit word.
        position: 64-bit position in the stream, an integer or an int64 tensor of shape (B,).
        shape: shape of the numbers for one seed and position.
        device: device of the result; the host by default.
        dtype: dtype of the result.
    """
    count = math.prod(shape)
    if device is not None and device.type == "mps":  # mps has no float64
        return normal(seed, stream, position, shape, None, dtype).to(device)
    u = (words(seed, stream, position, count + count % 2, device).double() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :count]
    return values.to(dtype).unflatten(1, tuple(shape)) if shape else values.to(dtype).squeeze(1)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """A random permutation of range(size), an int64 tensor of shape (size,).

    Args:
        seed: 64-bit seed.
        epoch: number of the epoch; each has its own permutation.
        size: number of elements.
    """
    return uniform(seed, Stream.ORDER, epoch, size)[0].argsort(stable=True)


def derive_seed(seed: int, stream: Stream, position: int) -> int:
    """A 32-bit seed for another library's generator, such as torch's for initial weights.

    Args:
        seed: 64-bit seed of the run.
        stream: purpose of the generator.
        position: 64-bit position in the stream.

    Returns:
        An integer in [0, 2^32).
    """
    return philox(
        (seed & MASK32, seed >> 32 & MASK32),
        (0, int(stream), position & MASK32, position >> 32 & MASK32),
    )[0]
