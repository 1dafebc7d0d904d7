"""A file of weights: safetensors, written atomically, that carries its own SHA-256."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class Corrupt(ValueError):
    """A file that is not what was written."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], **facts: int | str) -> None:
    """One safetensors file, whole or not there, whose metadata holds the facts and its own hash."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    # One metadata entry: safetensors writes several in no fixed order, and equal runs should give equal files.
    metadata = {"diffcore": json.dumps({**facts, "sha256": _digest(contiguous, facts)})}
    replace(path, save(contiguous, metadata))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_weights` wrote, verified.

    Raises:
        Corrupt: it is missing, truncated or changed.
    """
    return read_with_facts(path)[0]


def read_with_facts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a file that `write_weights` wrote, verified.

    Raises:
        Corrupt: it is missing, truncated or changed.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = dict(json.loads((file.metadata() or {})["diffcore"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            f"{path} cannot be read ({error}): resume the run to write it again, or copy it again"
        ) from None
    if facts.pop("sha256", None) != _digest(tensors, facts):
        raise Corrupt(
            f"{path} is not what was written (its SHA-256 differs): resume the run to write it again, or copy it again"
        )
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        save(dict(tensors)) + json.dumps(dict(facts), sort_keys=True).encode()
    ).hexdigest()


def hashed(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(path: Path, data: bytes) -> None:
    """Write a file that is whole or what it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    flush(temporary, data)
    temporary.rename(path)
    sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder that has its name only once it is whole, in place of an older one."""
    for left in folder.parent.glob(f".{folder.name}.*"):  # by an interrupted write
        if left.suffix[1:].isdigit():
            shutil.rmtree(left)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


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
