"""Keyed randomness: every random number is a pure function of (seed, stream, position, element).

    key = the 64 bits of the seed;  counter = (element // 4, stream, position's low and high 32 bits)
    words = Philox4x32-10(key, counter);  normals = Box-Muller on (word + ½) 2^-32

so a resumed run, another number of ranks or workers, another accumulation, other seeds beside it give the same numbers.
Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Integers are exact on every device.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffcore.core.prediction import edm_norm
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
    PATH = 9
    PERTURBATION = 20
    OFFSET = 21
    LATENT = 22


def philox(
    key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 on Python integers, or on int64 arrays that hold 32-bit words and broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # int64 products wrap, but their 32-bit halves are right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & M32) ^ c1 ^ k0,
            p1 & M32,
            ((p0 >> 32) & M32) ^ c3 ^ k1,
            p0 & M32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def words(
    seed: int | Tensor,
    stream: Stream,
    position: int | Tensor,
    count: int,
    device: torch.device | None = None,
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
    return torch.stack(
        torch.broadcast_tensors(*philox((key & M32, (key >> 32) & M32), counter)), -1
    ).flatten(1)[:, :count]


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
    return philox(
        (seed & M32, seed >> 32 & M32), (0, int(stream), position & M32, position >> 32 & M32)
    )[0]


DEPTH = 20
"""Levels of the path's tree: knots closer than 1e-5 in λ about 0, or 1e-3 about ±22, are one place to it."""
BLOCK = 2**16
"""Numbers of the path made together."""


def place(level: Level) -> int:
    """Where a level stands among the 2^DEPTH + 1 places of a path: τ = sigmoid(λ/4), rounded; 0 is pure noise."""
    if isinstance(level.logsnr, Tensor):
        raise ValueError(
            "a path of noise leads the whole batch from level to level, got a map of levels: use path=False"
        )
    return round(2**DEPTH / (1 + math.exp(min(-level.logsnr / 4, 700))))


def clock(at: int) -> float:
    """e^λ at a place, the time of the path: 0 at pure noise, inf at the clean level."""
    return (at / (2**DEPTH - at)) ** 4 if at < 2**DEPTH else math.inf


@lru_cache(4096)
def bridge(at: int) -> dict[int, float]:
    """W(clock(at)) = Σ c_m ξ_m over the places m bisected on the way there, ξ_m independent normals: {m: c_m}.

    Lévy's construction: between l and r, W(m) = W(l) + (m-l)/(r-l) (W(r) - W(l)) + √((m-l)(r-m)/(r-l)) ξ_m in clock time.
    """
    low, high = 0, 2**DEPTH
    below: dict[int, float] = {}
    above: dict[int, float] = {}
    while at not in (low, high):
        middle = (low + high) // 2
        start, now, end = clock(low), clock(middle), clock(high)
        share = (now - start) / (end - start)  # 0 where the path never ends
        W = {m: (1 - share) * below.get(m, 0.0) + share * above.get(m, 0.0) for m in below | above}
        W[middle] = math.sqrt((now - start) * (1 - share))
        if at < middle:
            high, above = middle, W
        else:
            low, below = middle, W
    return below


def increment(t: Level, s: Level) -> dict[int, float]:
    """(W(s) - W(t)) / √(e^λ_s - e^λ_t) = Σ c_m ξ_m: standard normal, and independent over intervals that do not overlap."""
    low, high = sorted((place(t), place(s)))
    if low == high or high == 2**DEPTH:
        raise ValueError(
            f"a path of noise has no increment from λ = {t.logsnr} to {s.logsnr}: a step to the clean level has no noise, "
            f"and levels closer than the path resolves need path=False"
        )
    start, end, scale = bridge(low), bridge(high), math.sqrt(clock(high) - clock(low))
    between = {m: (end.get(m, 0.0) - start.get(m, 0.0)) / scale for m in sorted(start | end)}
    return {m: c for m, c in between.items() if c}


@dataclass(frozen=True)
class Noise:
    """The noise of one sampling run: a row per seed, each row a function of its own seed and the step alone.

    With `path`, the noise of a step from level t to level s is the normalised increment of one Brownian motion of each seed,
    z = (W(s) - W(t)) / √(e^λ_s - e^λ_t) over the clock e^λ = α²/σ²: independent from step to step, and a function of
    (seed, t, s), so that the same seed on a finer grid is driven by the same motion, and the samples converge as steps are
    added. In that clock steps of DDIM(1) compose exactly as long as x_0 stays. It costs about 2·DEPTH normals a step
    instead of one.

    Args:
        seeds: one a row, 64-bit.
        shape: of one row.
        device: where the noise is made.
        dtype: of the noise.
        path: whether the noise of the steps is the increments of one path rather than keyed by the step's number.
        channel: which of the independent noises of a seed this is; `branch` numbers them.
    """

    seeds: Tensor
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    path: bool = False
    channel: int = 0

    def start(self) -> Tensor:
        """The noise that a run starts from."""
        return normal(self.seeds, Stream.START, 0, self.shape, self.device, self.dtype)

    def step(self, index: int) -> Tensor:
        """The noise of step `index`, keyed by its number."""
        return normal(
            self.seeds,
            Stream.STEP,
            (self.channel << 24) + index,
            self.shape,
            self.device,
            self.dtype,
        )

    def between(self, t: Level, s: Level, step: int) -> Tensor:
        """The standard normal noise of step number `step`, which leads from level t to level s."""
        if not self.path:
            return self.step(step)
        terms = increment(t, s)
        normals = self._normals(Stream.PATH, list(terms))
        return sum(
            (c * z for c, z in zip(terms.values(), normals, strict=True)),
            torch.zeros((), dtype=self.dtype),
        )

    def branch(self, index: int) -> "Noise":
        """The index-th independent noise beside this one, for what a step needs more than one normal for; may be nested."""
        if not 0 <= index < 2**12 - 1 or self.channel >= 2**27:
            raise ValueError(
                f"branch {index} of channel {self.channel}, expected below {2**12 - 1}, at most 3 deep"
            )
        return replace(self, channel=(self.channel << 12) + index + 1)

    def first_sample(self, level: Level, sigma_data: float) -> Tensor:
        """√(α² s² + σ²) z: x at the first level, when nothing is known of x_0 but its standard deviation s."""
        return edm_norm(level, sigma_data) * self.start()

    def _normals(self, stream: Stream, indices: Sequence[int]) -> Iterator[Tensor]:
        """One after the other, but made some at a time. Positions hold 24 bits of steps or places, the channel above them."""
        rows = len(self.seeds)
        together = max(1, BLOCK // max(1, rows * math.prod(self.shape)))
        for first in range(0, len(indices), together):
            positions = torch.tensor(indices[first : first + together]) + (self.channel << 24)
            seeds, positions = self.seeds.repeat(len(positions)), positions.repeat_interleave(rows)
            yield from normal(
                seeds, stream, positions, self.shape, self.device, self.dtype
            ).unflatten(0, (-1, rows))
