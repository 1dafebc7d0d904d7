"""A file of weights: safetensors, written atomically, that carries its own SHA-256."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class Corrupt(ValueError):
    """A file that is not what was written."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, str]) -> None:
    """One safetensors file, atomic, that carries its own hash in its metadata."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {**state, "sha256": _digest(contiguous, state)}
    flush(temporary, save(contiguous, metadata))
    temporary.rename(path)
    sync(path.parent)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_weights` wrote, verified.

    Raises:
        Corrupt: it is missing, truncated or changed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise Corrupt(f"{path} cannot be read ({error}): train on, or copy it again") from None
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise Corrupt(f"{path} is not what was written (its SHA-256 differs): train on, or copy it again")
    return tensors


def _digest(tensors: Mapping[str, Tensor], state: Mapping[str, str]) -> str:
    return hashlib.sha256(
        save(dict(sorted(tensors.items()))) + json.dumps(dict(state), sort_keys=True).encode()
    ).hexdigest()


def flush(path: Path, data: bytes) -> None:
    """Write a file through to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
