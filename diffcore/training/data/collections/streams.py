"""Data that can be read only forwards, such as remote files, in a keyed order.

    position p of the run    lane (p // turn) mod lanes,  sample n of it:
                             n = (p // turn // lanes) turn + p mod turn
    sample n of a lane       element π_b(n mod window) of its block b = n // window

A lane reads its own shards one after the other, in an order that is keyed anew in each of its
epochs. Consecutive samples of a lane form blocks of `window`, and each is permuted by a keyed π_b.
The sample at a position is therefore a function of (seed, position) for every number of ranks,
micro-batches and workers. What they change is how much each of them reads.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from diffcore.core.random import Stream, derive_seed, permutation
from diffcore.training.data.cache import hash_content
from diffcore.training.data.collections.images import ImageOptions
from diffcore.training.data.order.sequence import DataOrder
from diffcore.training.data.source import DataSource

__all__ = ["EncodedImage", "Restart", "StreamSource"]

Restart = Literal["reread", "renew"]

LANES = 2**16
"""Largest number of lanes."""


class EncodedImage(NamedTuple):
    """A sample of a stream.

    Args:
        content: bytes of the image file.
        label: label; -1 without one.
        name: name for messages.
    """

    content: bytes
    label: int
    name: str


class StreamSource(DataSource):
    """Images that can be read only forwards; a subclass reads the shards.

    The length is that of the window: items by index, which the examination of data and held-out
    losses read, are the first ones of the first shard. A run reads all shards, see `order`.

    Args:
        options: how the images become x_0.
        shards: number of shards, each a file that is read from its beginning.
        window: number of samples of a lane that are shuffled among each other, and held in memory
            as encoded images.
        lanes: number of sequences of shards that are read side by side; at most `shards`.
        turn: number of consecutive positions of the run that a lane supplies.
        restart: reread (a resumed run reads from the beginning of the stream, without decoding,
            up to its position, and continues exactly) or renew (it begins new epochs in another
            keyed order).

    Raises:
        ValueError: A number is out of range.
    """

    class_names: tuple[str, ...] | None = None
    is_stream = True

    def __init__(
        self,
        options: ImageOptions,
        shards: int,
        window: int,
        lanes: int,
        turn: int,
        restart: Restart,
    ) -> None:
        for name, value in (("window", window), ("turn", turn)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not 1 <= lanes <= min(shards, LANES):
            raise ValueError(
                f"lanes is {lanes}, expected 1 .. {min(shards, LANES)}, the number of shards"
            )
        if restart not in get_args(Restart):
            raise ValueError(f"restart is {restart!r}, expected one of reread, renew")
        self.options, self.shards, self.window = options, shards, window
        self.lanes, self.turn, self.restart = lanes, turn, restart
        self._open: dict[tuple[int, int, int], _Lane] = {}
        self._first: list[EncodedImage] = []

    def _read_shard(self, shard: int) -> Iterator[EncodedImage]:
        """Read a shard from its beginning.

        Args:
            shard: index of the shard.

        Yields:
            Its samples, not decoded.

        Raises:
            ValueError: It cannot be read.
        """
        raise NotImplementedError

    def _identity(self) -> tuple[str, ...]:
        """What names the content of the stream."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, for workers."""
        return vars(self) | {"_open": {}, "_first": []}

    def __len__(self) -> int:
        return self.window

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self._first:
            self._first = list(islice(self._read_shard(0), self.window))
        if not 0 <= index < len(self._first):
            raise ValueError(
                f"the first shard has {len(self._first)} samples: set window to at most as many to "
                "read items by index, or use a data set that is not a stream"
            )
        return self._decode(self._first[index])

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The sample at a position of the run, mirrored for half of them if `flip` is set.

        Args:
            index: number of samples of the run since the stream was begun, see `order`.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0 (C, size, size) and the label.
        """
        turn, offset = divmod(index, self.turn)
        round_, lane = divmod(turn, self.lanes)
        x0, label = self._decode(
            self._lane(lane, seed, position - index).sample(round_ * self.turn + offset)
        )
        return self.options.mirror(x0, seed, position), label

    def order(self, seed: int, batch: int, accumulation: int, rank: int, world: int) -> DataOrder:
        """The order of the stream.

        Args:
            seed: seed of the run.
            batch: size of the global batch.
            accumulation: number of micro-batches of a rank in a step.
            rank: index of the rank that reads.
            world: number of ranks.

        Returns:
            An order whose index counts the samples since the stream was begun: at the start of the
            run, or with `restart: renew` where it was last resumed.
        """
        kind = _RenewedOrder if self.restart == "renew" else _StreamOrder
        return kind(self.window, seed, batch, accumulation, rank, world)

    @property
    def content_hash(self) -> str:
        """Hash of the options and of the names of the shards, whose content is not read."""
        numbers = (self.shards, self.window, self.lanes, self.turn, self.restart)
        return hash_content(str(self.options), *map(str, numbers), *self._identity())

    def _decode(self, sample: EncodedImage) -> tuple[Tensor, int]:
        return self.options.decode(sample.content, sample.name), sample.label

    def _lane(self, lane: int, seed: int, begin: int) -> "_Lane":
        key = (lane, seed, begin)
        if key not in self._open:
            key_seed = derive_seed(seed, Stream.SHARD, begin * LANES + lane)
            self._open[key] = _Lane(self, lane, key_seed)
        return self._open[key]


class _StreamOrder(DataOrder):
    """An order whose index is the position: the stream was begun at the start of the run."""

    def index(self, position: int) -> int:
        """Number of samples since the stream was begun."""
        return position


class _RenewedOrder(DataOrder):
    """An order whose index counts from the start of its span, where the stream was begun."""

    def index(self, position: int) -> int:
        """Number of samples since the stream was begun."""
        return position - self.span.start * self.batch


class _Lane:
    """The samples of a lane, of which one block is in memory."""

    def __init__(self, source: StreamSource, lane: int, seed: int) -> None:
        self.source, self.seed = source, seed
        self.shards = range(lane, source.shards, source.lanes)
        self.samples: list[EncodedImage] = []
        self.order: list[int] = []
        self._rewind()

    def sample(self, number: int) -> EncodedImage:
        """A sample of the endless lane.

        Args:
            number: index of the sample; blocks before its block are read and dropped.

        Returns:
            The sample.
        """
        block, offset = divmod(number, self.source.window)
        if block < self.block:
            self._rewind()
        while self.block < block:
            self.samples = list(islice(self.stream, self.source.window))
            self.block += 1
            self.order = permutation(self.seed, 2 * self.block + 1, self.source.window).tolist()
        return self.samples[self.order[offset]]

    def _rewind(self) -> None:
        self.block, self.stream = -1, self._samples()

    def _samples(self) -> Iterator[EncodedImage]:
        for epoch in count():
            is_empty = True
            for row in permutation(self.seed, 2 * epoch, len(self.shards)).tolist():
                for sample in self.source._read_shard(self.shards[row]):
                    is_empty = False
                    yield sample
            if is_empty:
                raise ValueError(f"the shards {list(self.shards)[:5]} of a lane hold no samples")
