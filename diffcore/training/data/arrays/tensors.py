"""Tensors of safetensors files as a data set, of which single rows are read."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import check_header
from diffcore.training.data.arrays.shards import (
    Channels,
    ShardedRows,
    as_x0,
    check_row,
    find_shards,
    hash_shards,
)
from diffcore.training.data.cache import hash_content
from diffcore.training.data.listing import printable
from diffcore.training.data.source import DataSource

__all__ = ["Tensors"]

LABELS_KEY = "label"


class Tensors(DataSource):
    """Tensors of safetensors files: points, signals, volumes, video, latents or decoded images.

    Item i is row i of a tensor of shape (items, *shape of x_0). Rows are read when they are needed.
    Numbers are scaled as by `Arrays`.

    Args:
        path: .safetensors file; a folder or a glob pattern (`data/train-*.safetensors`) names
            several files, which are joined in the order of their names.
        key: name of the tensor of items in each file.
        labels_key: name of the tensor (items,) of integer labels; "" for data without labels. The
            default need not exist.
        channels: position of the axis of channels in an item: first for (C, H, W), last for
            (H, W, C), which is converted.

    Raises:
        ValueError: A file cannot be read, lacks a tensor, or its numbers have no known range; files
            have rows of different shapes; or there is not one label for each item.
    """

    labels: Tensor | None

    def __init__(
        self,
        path: str,
        key: str = "x0",
        labels_key: str = LABELS_KEY,
        channels: Channels = "first",
    ) -> None:
        if channels not in get_args(Channels):
            raise ValueError(f"channels is {channels!r}, expected first or last")
        self.key, self.channels = key, channels
        paths = find_shards(path, ".safetensors")
        shapes = [_shape(file, key) for file in paths]
        for file, shape in zip(paths, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise ValueError(
                    f"{printable(file)} has rows of shape {shape[1:]}, and {printable(paths[0])} "
                    f"of shape {shapes[0][1:]}: expected one shape"
                )
            check_row(file, shape, _slice(file, key)[:0].dtype, channels)
        self.rows = ShardedRows(paths, [shape[0] for shape in shapes])
        self.labels = _read_labels(paths, [shape[0] for shape in shapes], labels_key)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, row = self.rows.locate(index)
        label = -1 if self.labels is None else int(self.labels[index])
        return as_x0(_slice(path, self.key)[row : row + 1][0], self.channels), label

    @property
    def content_hash(self) -> str:
        """Hash of the options, the labels, and a part of each file, see `hash_shards`."""
        labels = "" if self.labels is None else str(self.labels.tolist())
        return hash_content(self.key, self.channels, labels, hash_shards(self.rows.paths))


def _open(path: Path) -> Any:
    """An open file, of which each process opens its own and a changed one is opened anew."""
    try:
        check_header(path, is_read_whole=False)
        status = path.stat()
        return _open_version(path, status.st_ino, status.st_size, status.st_mtime_ns)
    except (SafetensorError, CorruptFileError, OSError) as error:
        reason = "" if isinstance(error, CorruptFileError) else f"{printable(path)}: "
        raise ValueError(f"{reason}{error}") from None


@lru_cache(maxsize=64)
def _open_version(path: Path, *version: int) -> Any:
    return safe_open(path, "pt")


def _slice(path: Path, key: str) -> Any:
    """A tensor of a file, of which rows can be read."""
    file = _open(path)
    if key not in file.keys():  # noqa: SIM118 - it is no mapping
        raise ValueError(
            f"{printable(path)} has no tensor {key!r}, but {', '.join(sorted(file.keys())[:10])}: "
            "set key to the name of the items"
        )
    return file.get_slice(key)


def _shape(path: Path, key: str) -> tuple[int, ...]:
    return tuple(_slice(path, key).get_shape())


def _read_labels(paths: Sequence[Path], counts: Sequence[int], key: str) -> Tensor | None:
    """The labels of all items, or None without labels.

    Raises:
        ValueError: Some files have no labels, or do not hold an integer for each item.
    """
    present = [key in _open(path).keys() for path in paths]  # noqa: SIM118 - it is no mapping
    if not key or (key == LABELS_KEY and not any(present)):
        return None
    if not all(present):
        raise ValueError(
            f"{printable(paths[present.index(False)])} has no tensor {key!r} of labels: set "
            "labels_key to its name, or to '' for data without labels"
        )
    parts = [_open(path).get_tensor(key) for path in paths]
    for path, part, count in zip(paths, parts, counts, strict=True):
        is_integer = not (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool)
        if tuple(part.shape) != (count,) or not is_integer:
            raise ValueError(
                f"{printable(path)} has labels of {part.dtype} and shape {tuple(part.shape)}, "
                f"expected an integer for each item, of shape ({count},)"
            )
    return torch.cat([part.long() for part in parts])
