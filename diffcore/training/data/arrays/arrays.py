"""Arrays of .npy files as a data set, of which single rows are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore.training.data.arrays.shards import Channels, RowSource, find_shards
from diffcore.training.data.listing import printable

__all__ = ["Arrays"]

LABEL_NAMES = ("label", "labels", "y")
"""Names of the labels in an .npz file of several arrays."""


class Arrays(RowSource):
    """Arrays of .npy files: points in R^n, signals, volumes, video, latents or decoded images.

    Item i is row i of an array of shape (items, *shape of x_0). Each row is read from the file when
    it is needed, so that memory does not grow with the file. Floating-point numbers are kept;
    integers of 8 and 16 bits are scaled to [-1, 1]: uint8 as v/127.5 - 1, uint16 as
    v/32767.5 - 1, int8 as v/128 and int16 as v/32768.

    Args:
        path: .npy file; a folder or a glob pattern (`data/train-*.npy`) names several files, which
            are joined in the order of their names.
        labels: .npy file, folder or pattern with an integer label for each item, or an .npz file
            with such an array; "" for data without labels.
        channels: position of the axis of channels in an item: first for (C, H, W), last for
            (H, W, C), which is converted.
        conditions: name of each condition of the process -> .npy file, folder or pattern with its
            value for each item, of shape (items, *shape of the condition); its numbers are scaled
            as those of the items. `channels` holds for conditions with as many axes as an item.

    Raises:
        ValueError: A file cannot be read, is truncated, or holds Python objects or numbers without
            a known range; files have rows of different shapes; or there is not one label for each
            item.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/points.npy"
        >>> np.save(path, np.float32([[0.5, -1], [0, 1]]))
        >>> Arrays(path)[0]
        (tensor([ 0.5000, -1.0000]), -1)
    """

    def __init__(
        self,
        path: str,
        labels: str = "",
        channels: Channels = "first",
        conditions: dict[str, str] | None = None,
    ) -> None:
        label_files = _find_labels(labels) if labels else []
        named = {name: find_shards(file, ".npy") for name, file in (conditions or {}).items()}
        others = [*label_files, *(file for files in named.values() for file in files)]
        files = [_read_header(file) for file in find_shards(path, ".npy", without=others)]
        self.files = {file.path: file for file in files}
        dtypes = [_torch_dtype(file) for file in files]
        super().__init__([*self.files], [file.shape for file in files], dtypes, channels)
        self.labels = _read_labels(label_files, len(self)) if labels else None
        axes, rows = len(files[0].shape), {}
        for name, file in (conditions or {}).items():
            is_like_item = len(_read_header(named[name][0]).shape) == axes
            rows[name] = Arrays(file, channels=channels if is_like_item else "first")
        self._add_conditions(rows)

    def _read_row(self, path: Path, row: int) -> Tensor:
        return self.files[path].read(row)


@dataclass(frozen=True)
class _ArrayFile:
    """Where the rows of an array lie in its file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    def read(self, row: int) -> Tensor:
        # A memory map would count every page that was read as memory of this process, and end it
        # without a message once the file is truncated.
        values = np.empty(self.shape[1:], self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + row * values.nbytes)
            count = file.readinto(values.view(np.uint8).data)
        if count != values.nbytes:
            raise ValueError(f"{printable(self.path)} became shorter since the start of the run")
        return torch.from_numpy(values.astype(self.dtype.newbyteorder("="), copy=False))


def _read_header(path: Path) -> _ArrayFile:
    """The shape, type and offset of an array, whose rows are not read.

    Raises:
        ValueError: The file is no array, is truncated, holds Python objects, or stores columns one
            after the other.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, OverflowError, EOFError) as error:
        raise ValueError(f"{printable(path)} cannot be read as an array: {error}") from None
    if array.ndim and not array.flags.c_contiguous:
        raise ValueError(
            f"{printable(path)} is in Fortran order, in which an item is not stored in one piece: "
            "save numpy.ascontiguousarray of it"
        )
    return _ArrayFile(path, array.shape, array.dtype, array.offset)


def _torch_dtype(file: _ArrayFile) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, file.dtype.newbyteorder("="))).dtype
    except TypeError:
        raise ValueError(
            f"{printable(file.path)} holds {file.dtype}, expected numbers of one type: convert it "
            "to float32"
        ) from None


def _find_labels(path: str) -> list[Path]:
    return find_shards(path, ".npz" if path.endswith(".npz") else ".npy")


def _read_labels(paths: Sequence[Path], size: int) -> Tensor:
    """The labels (size,) of all items.

    Raises:
        ValueError: A file cannot be read, or does not hold an integer for each item.
    """
    parts = [_load(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.ndim != 1 or part.dtype.kind not in "iu":
            raise ValueError(
                f"{printable(path)} holds {part.dtype} of shape {part.shape}, expected an integer "
                "label for each item, of shape (items,)"
            )
    labels = np.concatenate(parts)
    if len(labels) != size:
        raise ValueError(
            f"{printable(paths[0])} has {len(labels)} labels, but the data has {size} items: "
            "expected one label for each"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _load(path: Path) -> Any:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            names = [name for name in content.files if name in LABEL_NAMES] or content.files
            if len(names) != 1:
                raise ValueError(
                    f"it has the arrays {', '.join(content.files)}, expected one that is named "
                    f"{' or '.join(LABEL_NAMES)}"
                )
            return content[names[0]]
    except Exception as error:  # a damaged archive raises errors of zipfile and zlib
        raise ValueError(f"{printable(path)} cannot be read as labels: {error}") from None
