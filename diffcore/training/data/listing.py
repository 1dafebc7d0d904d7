"""The files of a folder: names, sizes and times, in tensors instead of objects.

A folder of a million images takes some 50 MB this way; as many paths would take 500 MB, in each
worker that loads data. Tensors are shared between workers, not copied.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

__all__ = ["FileList", "PackedTexts", "find_files", "list_files", "printable"]


class PackedTexts(Sequence[str]):
    """A sequence of texts, such as names of files, in two tensors.

    Args:
        data: (bytes,) uint8, the encoded texts one after the other.
        ends: (N,) int64, the index in `data` at which each text ends.
    """

    def __init__(self, data: Tensor, ends: Tensor) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedTexts":
        """Pack texts, which may hold names of files that are not UTF-8."""
        encoded = [os.fsencode(text) for text in texts]
        lengths = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
        return cls(_as_tensor(b"".join(encoded)), lengths.cumsum(0))

    @classmethod
    def checked(cls, data: Tensor, ends: Tensor) -> "PackedTexts":
        """The texts that a file holds.

        Args:
            data: encoded texts.
            ends: index at which each text ends.

        Returns:
            The texts.

        Raises:
            ValueError: The tensors are not those of packed texts.
        """
        if (data.dtype, ends.dtype, data.ndim, ends.ndim) != (torch.uint8, torch.int64, 1, 1):
            raise ValueError("its texts have another type")
        lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        if bool((lengths < 0).any()) or int(lengths.sum()) != len(data):
            raise ValueError("its texts have other lengths")
        return cls(data, ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        first = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.data[first : int(self.ends[row])].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        data = self.data.numpy().tobytes()
        for first, end in pairwise([0, *self.ends.tolist()]):
            yield os.fsdecode(data[first:end])

    def equals(self, other: "PackedTexts") -> bool:
        """Whether two sequences hold the same texts."""
        return torch.equal(self.ends, other.ends) and torch.equal(self.data, other.data)

    @property
    def sha256(self) -> str:
        """Hash of the texts, 64 hexadecimal digits."""
        content = self.ends.numpy().astype("<i8").tobytes() + self.data.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, eq=False)
class FileList:
    """The files of a folder and its sub-folders, sorted by name.

    Args:
        names: path of each file below the folder.
        bytes: (N,) int64 size; -1 if the file does not exist, as for a broken link.
        mtime_ns: (N,) int64 time of the last change in nanoseconds; -1 if it does not exist.
        link: (N,) int64 hash of the place to which links on the path lead; 0 without links.
    """

    names: PackedTexts
    bytes: Tensor
    mtime_ns: Tensor
    link: Tensor


def list_files(folder: str | Path, suffixes: tuple[str, ...]) -> FileList:
    """List the files of a folder and its sub-folders with some suffixes.

    Args:
        folder: folder to list, see `find_files`.
        suffixes: endings of names in lower case, such as ".png".

    Returns:
        The files.

    Raises:
        ValueError: It is not a folder, or a link in it leads to a folder that contains the link.
    """
    names: list[str] = []
    columns = array("q"), array("q"), array("q")
    root = os.path.realpath(folder)
    for name, real, entry in _walk(_checked(folder), "", (root,), False):
        if not name.lower().endswith(suffixes):
            continue
        try:
            status = entry.stat()
            facts = (status.st_size, status.st_mtime_ns)
        except OSError:
            facts = (-1, -1)
        names.append(name)
        for column, value in zip(columns, (*facts, _hash_link(real, root)), strict=True):
            column.append(value)
    order = sorted(range(len(names)), key=names.__getitem__)
    rows = torch.tensor(order, dtype=torch.int64)
    packed = PackedTexts.pack(names[row] for row in order)
    return FileList(packed, *(torch.tensor(column, dtype=torch.int64)[rows] for column in columns))


def find_files(folder: str | Path) -> list[str]:
    """List the files of a folder and its sub-folders, sorted by name.

    A link to a file or folder is followed, and keeps its own name. A file or folder whose name
    begins with a dot is left out.

    Args:
        folder: folder to list.

    Returns:
        The paths below `folder`. They may include devices and broken links.

    Raises:
        ValueError: It is not a folder, or a link in it leads to a folder that contains the link.
    """
    parents = (os.path.realpath(folder),)
    return sorted(name for name, _, _ in _walk(_checked(folder), "", parents, False))


def printable(path: Path | str) -> str:
    """A path as text for messages (one line); bytes that are not UTF-8 are escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _checked(folder: str | Path) -> str:
    if not Path(folder).is_dir():
        raise ValueError(
            f"{printable(folder)} is not a folder: expected one with images, in sub-folders by "
            "class if they have one"
        )
    return str(folder)


def _walk(
    folder: str, prefix: str, parents: tuple[str, ...], is_linked: bool
) -> "Iterator[tuple[str, str, os.DirEntry[str]]]":
    """The name of each file, what links lead to ("" without links), and its entry.

    Args:
        folder: folder to list.
        prefix: path of the folder below the listed one, with a slash at its end.
        parents: resolved paths of the folder and of those around it.
        is_linked: True if the path of the folder contains a link.

    Yields:
        The files, in the order of the file system.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_link = entry.is_symlink()
            real = os.path.realpath(entry.path) if is_link else f"{parents[-1]}/{entry.name}"
            if not entry.is_dir():
                yield prefix + entry.name, real if is_link or is_linked else "", entry
            elif is_link and real in parents:
                raise ValueError(
                    f"{printable(entry.path)} is a link to a folder that contains it: remove the "
                    "link"
                )
            else:
                yield from _walk(
                    entry.path, f"{prefix}{entry.name}/", (*parents, real), is_link or is_linked
                )


def _hash_link(real: str, root: str) -> int:
    """Hash of a place relative to a folder, so that both can be moved together."""
    if not real:
        return 0
    digest = hashlib.sha256(os.fsencode(os.path.relpath(real, root))).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
