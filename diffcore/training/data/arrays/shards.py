"""Rows of several files as one data set, and how numbers of a file become x_0."""

import glob
import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffcore.training.data.cache import hash_content
from diffcore.training.data.listing import printable
from diffcore.training.data.source import DataSource

__all__ = [
    "Channels",
    "RowSource",
    "ShardedRows",
    "as_x0",
    "check_row",
    "find_shards",
    "hash_shards",
]

Channels = Literal["first", "last"]

BLOCK = 1 << 16
BLOCKS = 1024
"""Number of blocks of `BLOCK` bytes that are hashed over all files: 64 MB."""
DIVISORS = {torch.uint8: 127.5, torch.uint16: 32767.5, torch.int8: 128.0, torch.int16: 32768.0}
"""Largest value of an unsigned type, halved, or of a signed one, plus 1."""


class RowSource(DataSource):
    """A data set whose item i is row i of arrays in several files; a subclass reads the rows.

    Args:
        paths: files in order.
        shapes: shape of the array in each file, (items, *shape of x_0).
        dtypes: type of its numbers.
        channels: position of the axis of channels in an item.

    Raises:
        ValueError: The arrays are none of items, or have rows of different shapes.
    """

    labels: Tensor | None = None
    conditions: Mapping[str, "RowSource"] = MappingProxyType({})
    """Rows of each condition, by its name; row i belongs to item i."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype],
        channels: Channels,
    ) -> None:
        if channels not in get_args(Channels):
            raise ValueError(f"channels is {channels!r}, expected first or last")
        for path, shape, dtype in zip(paths, shapes, dtypes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise ValueError(
                    f"{printable(path)} has rows of shape {shape[1:]}, and {printable(paths[0])} "
                    f"of shape {shapes[0][1:]}: expected one shape"
                )
            check_row(path, shape, dtype, channels)
        self.channels = channels
        self.rows = ShardedRows(paths, [shape[0] for shape in shapes])

    def _read_row(self, path: Path, row: int) -> Tensor:
        """Read a row of a file.

        Args:
            path: one of the files.
            row: number of the row in this file.

        Returns:
            Its numbers as they are stored.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        label = -1 if self.labels is None else int(self.labels[index])
        item = self._read(index), label
        if not self.conditions:
            return item
        return *item, {name: rows._read(index) for name, rows in self.conditions.items()}

    def _read(self, index: int) -> Tensor:
        """Row `index` of all files as a float tensor."""
        return as_x0(self._read_row(*self.rows.locate(index)), self.channels)

    def _add_conditions(self, conditions: Mapping[str, "RowSource"]) -> None:
        """Add the rows of conditions, one for each item.

        Raises:
            ValueError: A condition has another number of rows than there are items.
        """
        for name, rows in conditions.items():
            if len(rows) != len(self):
                raise ValueError(
                    f"{printable(rows.rows.paths[0])} has {len(rows)} rows of the condition "
                    f"{name}, but the data has {len(self)} items: expected one row for each"
                )
        self.conditions = dict(conditions)

    @property
    def content_hash(self) -> str:
        """Hash of the options, the labels, and a part of each file, see `hash_shards`."""
        labels = "" if self.labels is None else str(self.labels.tolist())
        named = [f"{name} {rows.content_hash}" for name, rows in self.conditions.items()]
        return hash_content(*self._options(), labels, hash_shards(self.rows.paths), *named)

    def _options(self) -> tuple[str, ...]:
        """The options that determine the items."""
        return (self.channels,)


class ShardedRows:
    """The rows of several files, numbered from 0.

    Args:
        paths: files in order.
        counts: number of rows of each file.

    Raises:
        ValueError: No file has a row.
    """

    def __init__(self, paths: Sequence[str | Path], counts: Sequence[int]) -> None:
        self.paths, self.ends = list(map(Path, paths)), list(accumulate(counts))
        if not self.ends[-1]:
            raise ValueError(f"{printable(self.paths[0])} is empty: expected at least one item")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of a row, and its number in this file.

        Args:
            index: number of the row; negative numbers count from the end.

        Raises:
            IndexError: There is no such row.
        """
        row = range(len(self))[index]
        shard = bisect_right(self.ends, row)
        return self.paths[shard], row - (self.ends[shard - 1] if shard else 0)


def find_shards(path: str, suffix: str, without: Sequence[str | Path] = ()) -> list[Path]:
    """Find the files that a path names, sorted by name.

    Args:
        path: a file; a folder, of which the files with the suffix are taken; or a glob pattern,
            such as `data/train-*.npy`.
        suffix: suffix of the files, such as ".npy".
        without: files to leave out.

    Returns:
        At least one file.

    Raises:
        ValueError: There is no such file, or it has another suffix or is not a regular file.
    """
    if Path(path).is_dir():
        paths = [file for file in Path(path).glob(f"*{suffix}") if not file.name.startswith(".")]
    else:
        paths = [Path(path)] if Path(path).exists() else list(map(Path, glob.glob(path)))
    excluded = {Path(file).resolve() for file in without}
    paths = sorted(file for file in paths if file.resolve() not in excluded)
    if not paths:
        raise ValueError(
            f"{printable(path)} names no {suffix} file: expected a file, a folder of such files, "
            "or a pattern such as data/train-*" + suffix
        )
    for file in paths:
        if file.suffix != suffix or not file.is_file():
            raise ValueError(f"{printable(file)} is not a {suffix} file")
    return paths


def hash_shards(paths: Sequence[str | Path]) -> str:
    """Hash of the names and sizes of files, and of blocks that are spread evenly over each.

    At most 64 MB (and two blocks of 64 kB for each file) are read, so that the hash of a large file
    is cheap. Up to that size the whole content is hashed. In a larger file, a change of a few items
    is not noticed if it keeps the size.

    Args:
        paths: files.

    Returns:
        64 hexadecimal digits of SHA-256.
    """
    files = [(path, path.stat().st_size) for path in map(Path, paths)]
    is_small = sum(size for _, size in files) <= BLOCKS * BLOCK
    whole, share = hashlib.sha256(), BLOCKS if is_small else max(2, BLOCKS // len(files))
    for path, size in files:
        whole.update(f"{len(path.name)} {path.name} {size}".encode(errors="surrogateescape"))
        with path.open("rb", buffering=0) as file:
            blocks = min(share, -(-size // BLOCK))
            for block in range(blocks):
                file.seek(block * max(0, size - BLOCK) // max(1, blocks - 1))
                whole.update(file.read(BLOCK))
    return whole.hexdigest()


def check_row(
    path: str | Path, shape: Sequence[int], dtype: torch.dtype, channels: Channels
) -> None:
    """Check that the rows of an array are x_0.

    Args:
        path: file of the array, for messages.
        shape: shape of the array.
        dtype: type of its numbers.
        channels: position of the axis of the channels.

    Raises:
        ValueError: The array has no axis besides that of the items, or its numbers have no known
            range.
    """
    if len(shape) < 2:
        raise ValueError(
            f"{printable(path)} has the shape {tuple(shape)}, expected (items, *shape of x_0): "
            "reshape numbers to (items, 1)"
        )
    if channels == "last" and len(shape) < 3:
        raise ValueError(
            f"{printable(path)} has the shape {tuple(shape)} without an axis of channels: leave "
            "channels: last out"
        )
    if not dtype.is_floating_point and dtype not in DIVISORS:
        raise ValueError(
            f"{printable(path)} holds {str(dtype).removeprefix('torch.')}, whose range is not "
            "known: convert it to float32 in the range of the process (process.low, process.high)"
        )


def as_x0(row: Tensor, channels: Channels) -> Tensor:
    """A row of an array as x_0.

    Floating-point numbers are kept. Integers of b bits are scaled: v/((2^b - 1)/2) - 1, in [-1, 1],
    if they are unsigned, and v/2^(b-1), in [-1, 1), if they are signed.

    Args:
        row: numbers of 8 or 16 bits, or floating-point numbers.
        channels: position of the axis of the channels; `last` is moved to the front.

    Returns:
        x_0, float32.
    """
    x0 = row.float()
    if divisor := DIVISORS.get(row.dtype):
        x0 = x0 / divisor if row.dtype.is_signed else x0 / divisor - 1
    return x0.movedim(-1, 0).contiguous() if channels == "last" else x0
