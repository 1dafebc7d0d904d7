"""Tensors of safetensors files as a data set, of which single rows are read."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import check_header
from diffcore.training.data.arrays.shards import Channels, RowSource, find_shards
from diffcore.training.data.listing import printable

__all__ = ["Tensors"]

LABELS_KEY = "label"


class Tensors(RowSource):
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
        conditions: name of each condition of the process -> name of the tensor of its values in
            each file, of shape (items, *shape of the condition); its numbers are scaled as those of
            the items. `channels` holds for conditions with as many axes as an item.

    Raises:
        ValueError: A file cannot be read, lacks a tensor, or its numbers have no known range; files
            have rows of different shapes; or there is not one label for each item.
    """

    def __init__(
        self,
        path: str,
        key: str = "x0",
        labels_key: str = LABELS_KEY,
        channels: Channels = "first",
        conditions: dict[str, str] | None = None,
    ) -> None:
        self.key, paths = key, find_shards(path, ".safetensors")
        shapes = [_shape(file, key) for file in paths]
        dtypes = [_slice(file, key)[:0].dtype for file in paths]
        super().__init__(paths, shapes, dtypes, channels)
        self.labels = _read_labels(paths, [shape[0] for shape in shapes], labels_key)
        rows = {}
        for name, tensor in (conditions or {}).items():
            is_like_item = len(_shape(paths[0], tensor)) == len(shapes[0])
            rows[name] = Tensors(path, tensor, "", channels if is_like_item else "first")
        self._add_conditions(rows)

    def _read_row(self, path: Path, row: int) -> Tensor:
        values: Tensor = _slice(path, self.key)[row : row + 1][0]
        return values

    def _options(self) -> tuple[str, ...]:
        return (self.key, self.channels)


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
