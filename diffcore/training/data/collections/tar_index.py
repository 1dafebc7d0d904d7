"""The index of a tar file: where its samples lie, recorded, so that it is read through once.

    FOLDER/.NAME.tar.diffcore-index.safetensors      stems, offsets, sizes, labels, captions

Where the folder cannot be written, the record is in the cache of the user, as the scan of a folder
of images is. A file of another size or time of the last change is indexed again.
"""

import os
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.io.files import CorruptFileError
from diffcore.io.lock import wait_for_lock
from diffcore.io.safetensors import read_weights_and_metadata, write_weights
from diffcore.training.data.collections.tar_members import (
    Fields,
    Sample,
    group_samples,
    read_members,
)
from diffcore.training.data.listing import PackedTexts, printable
from diffcore.training.data.scan import record_path

__all__ = ["TarIndex", "index_tar", "read_bytes"]

VERSION = 1
"""Number of the rule by which members are grouped: an index of another one is made again."""


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of a tar file, in its order.

    Args:
        stems: path of each sample in the file, without extension.
        offset: (N,) int64 position of the image in the file in bytes.
        bytes: (N,) int64 size of the image.
        label: (N,) int64 label; -1 without labels.
        captions: caption of each sample; none without captions.
    """

    stems: PackedTexts
    offset: Tensor
    bytes: Tensor
    label: Tensor
    captions: PackedTexts


def index_tar(path: str | Path, fields: Fields) -> TarIndex:
    """Read the recorded index of a tar file, or make it.

    Args:
        path: uncompressed tar file.
        fields: members that are the image, the label and the caption.

    Returns:
        The index.

    Raises:
        ValueError: The file is damaged, truncated or hostile, or a sample is incomplete; the
            message contains the names of the file and of the member.
    """
    path = Path(path)
    record = record_path(path.parent, f".{path.name}.diffcore-index.safetensors")
    status = path.stat()
    identity = {
        "version": VERSION,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "fields": list(astuple(fields)),
    }
    if (index := _read_record(record, identity)) is not None:
        return index
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(record.with_suffix(".lock"), f"the index of {printable(path)}"):
        if (index := _read_record(record, identity)) is None:
            index = _make_index(path, fields)
            with suppress(OSError):  # then it is made again next time
                _write(record, index, identity)
    return index


def read_bytes(path: str | Path, offset: int, size: int) -> bytes:
    """Read a part of a file.

    Args:
        path: the file.
        offset: position of the first byte.
        size: number of bytes.

    Returns:
        The bytes.

    Raises:
        ValueError: The file became shorter, or cannot be read.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from None
    if len(content) != size:
        raise ValueError(f"{printable(path)} became shorter since the start of the run")
    return content


def _make_index(path: Path, fields: Fields) -> TarIndex:
    try:
        with path.open("rb") as file:
            members = read_members(
                file, False, lambda _, member: (int(member.offset_data), int(member.size))
            )
            samples = group_samples(members, fields, lambda where: read_bytes(path, *where))
            bar = tqdm(samples, desc=f"indexing {printable(path.name)}", delay=1, mininterval=0.5)
            return _index_of(list(bar))
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{printable(path)} is refused: {error}") from None


def _index_of(samples: list[Sample[tuple[int, int]]]) -> TarIndex:
    where = torch.tensor([sample.image for sample in samples], dtype=torch.int64).view(-1, 2)
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    return TarIndex(
        PackedTexts.pack(sample.stem for sample in samples),
        where[:, 0].contiguous(),
        where[:, 1].contiguous(),
        torch.tensor(labels, dtype=torch.int64),
        PackedTexts.pack(sample.caption for sample in samples if sample.caption is not None),
    )


def _write(record: Path, index: TarIndex, identity: dict[str, Any]) -> None:
    tensors = {"offset": index.offset, "bytes": index.bytes, "label": index.label}
    for name, texts in (("stems", index.stems), ("captions", index.captions)):
        tensors |= {f"{name}.data": texts.data, f"{name}.ends": texts.ends}
    write_weights(record, tensors, **identity)


def _read_record(record: Path, identity: dict[str, Any]) -> TarIndex | None:
    """The recorded index, or None if there is none of this file or it is damaged."""
    if not record.is_file():
        return None
    try:
        tensors, metadata = read_weights_and_metadata(record)
        if metadata != identity:
            return None
        return _checked(tensors)
    except (CorruptFileError, ValueError, KeyError):
        return None


def _checked(tensors: dict[str, Tensor]) -> TarIndex:
    """The index of a record whose columns fit together; raises an error otherwise."""
    stems, captions = (
        PackedTexts.checked(tensors[f"{name}.data"], tensors[f"{name}.ends"])
        for name in ("stems", "captions")
    )
    offset, size, label = columns = [tensors[name] for name in ("offset", "bytes", "label")]
    shape = (len(stems),)
    is_whole = all(column.dtype == torch.int64 and column.shape == shape for column in columns)
    if not is_whole or len(captions) not in (0, len(stems)) or bool((columns[1] < 0).any()):
        raise ValueError("its columns do not fit together")
    return TarIndex(stems, offset, size, label, captions)
