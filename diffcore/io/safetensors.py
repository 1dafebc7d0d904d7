"""Safetensors files that are written atomically and carry the SHA-256 of their content."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffcore.io.files import CorruptFileError, write_file
from diffcore.io.network_size import machine_memory

__all__ = [
    "check_header",
    "count_numbers",
    "hash_tensors",
    "read_step",
    "read_weights",
    "read_weights_and_metadata",
    "write_weights",
]

REMEDY = "resume the run to write it again, or copy it again"


MAXIMUM_HEADER = 1 << 24
"""Largest header in bytes: names and shapes of about a hundred thousand tensors."""


def check_header(path: str | Path, is_read_whole: bool = True) -> None:
    """Check the sizes that a safetensors file declares, before its header is read.

    Args:
        path: file to check.
        is_read_whole: False for a file of which single rows are read.

    Raises:
        CorruptFileError: the file is missing, its header is longer than the file or than any
            network needs, or a file that is read whole is larger than the memory of this machine.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read ({error}): {REMEDY}") from None
    if size < 8 or not 0 < length <= min(size - 8, MAXIMUM_HEADER):
        raise CorruptFileError(
            f"{path} cannot be read (its header has {length:,} bytes, expected at most "
            f"{max(0, min(size - 8, MAXIMUM_HEADER)):,}): {REMEDY}"
        )
    if is_read_whole and size > machine_memory():
        raise CorruptFileError(
            f"{path} cannot be read (it has {size:,} bytes, and this machine's memory "
            f"{machine_memory():,}): {REMEDY}"
        )


def count_numbers(path: str | Path) -> int:
    """The number of entries of all tensors in a safetensors file, from its header.

    Args:
        path: file to read.

    Returns:
        The sum of the sizes of the tensors.

    Raises:
        CorruptFileError: the file is missing, or its header is too long or no JSON of shapes.
    """
    path = Path(path)
    check_header(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return sum(math.prod(tensor["shape"]) for tensor in header.values())
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}): {REMEDY}") from None


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], **metadata: int | str) -> None:
    """Write a safetensors file atomically; equal tensors and metadata give equal bytes.

    Args:
        path: file to write or replace.
        tensors: tensors by name.
        **metadata: values that are stored beside the tensors, with the SHA-256 of both.
    """
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    content = {**metadata, "sha256": _hash(contiguous, metadata)}
    # safetensors writes metadata entries in no fixed order: one entry keeps the bytes reproducible.
    write_file(path, save(contiguous, {"diffcore": json.dumps(content)}))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read and verify the tensors of a file that `write_weights` wrote.

    Args:
        path: file to read.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CorruptFileError: the file is missing, truncated or changed.
    """
    return read_weights_and_metadata(path)[0]


def read_weights_and_metadata(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify the tensors and the metadata of a file that `write_weights` wrote.

    Args:
        path: file to read.

    Returns:
        The tensors by name, on the CPU, and the metadata without the hash.

    Raises:
        CorruptFileError: the file is missing, truncated or changed.
    """
    check_header(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(json.loads((file.metadata() or {})["diffcore"]))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}): {REMEDY}") from None
    if metadata.pop("sha256", None) != _hash(tensors, metadata):
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs): {REMEDY}")
    return tensors, metadata


def read_step(path: str | Path) -> int | None:
    """The optimizer step that `write_weights` stored in a file, which is not verified.

    Args:
        path: file to read.

    Returns:
        The step; None if the file has none or cannot be read.
    """
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            step = json.loads((file.metadata() or {})["diffcore"])["step"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return step if isinstance(step, int) else None


def hash_tensors(*groups: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values of tensors.

    Args:
        *groups: tensors by name, on any device; other values are left out.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensors in groups:
        for name, value in sorted(tensors.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    content = save(dict(tensors)) + json.dumps(dict(metadata), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
