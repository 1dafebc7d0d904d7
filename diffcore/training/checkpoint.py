"""Checkpoints: safetensors and JSON only, atomic, and every file hashed.

    checkpoints/step-00000400/model.safetensors
                              ema.safetensors
                              training.safetensors
                              manifest.json

A folder is written under a temporary name, flushed, and renamed, so that a folder with that name is
complete. manifest.json holds the training state, and the size and SHA-256 of each file and of
itself, so that every flipped bit is detected.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from diffcore.io.files import CorruptFileError, sync_folder, write_and_sync

__all__ = ["Checkpoint", "name", "newest", "prune", "read", "set_aside", "write"]

MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Args:
        tensors: tensors by name, for each file name.
        state: plain data beside them.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder atomically, in place of one with that name."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for file, tensors in checkpoint.tensors.items():
        data = save({key: value.contiguous() for key, value in tensors.items()})
        write_and_sync(temporary / file, data)
        files[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"state": checkpoint.state, "files": files}
    write_and_sync(
        temporary / MANIFEST,
        json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode(),
    )
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint in `folder` and verify every byte.

    Returns:
        The tensors and the state that `write` stored.

    Raises:
        CorruptFileError: A file is missing, truncated or changed; the message contains its path.
    """
    manifest = _manifest(folder)
    return Checkpoint(
        {file: _tensors(folder / file, expected) for file, expected in manifest["files"].items()},
        manifest["state"],
    )


def newest(folder: Path, message: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: folder of the checkpoints.
        message: prints a line for each newer checkpoint that is corrupt.

    Returns:
        The checkpoint, or None if there is no whole one.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path)
        except CorruptFileError as error:
            message(f"{error}; going back to the checkpoint before it")
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename the corrupt checkpoints after `step`, so that `prune` does not count them."""
    for path in folder.glob("step-*"):
        if path.name > name(step):
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def name(step: int) -> str:
    """The folder name of a checkpoint, by its number of steps; the names sort like the numbers."""
    return f"step-{step:08d}"


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the remains of interrupted writes."""
    for path in sorted(folder.glob("step-*"))[: -keep or None]:
        shutil.rmtree(path)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptFileError(f"{path} cannot be read ({type(error).__name__})") from None
    if digest != _digest(manifest):
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs)")
    return manifest


def _tensors(path: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing")
    data = path.read_bytes()
    if len(data) != expected["bytes"]:
        raise CorruptFileError(
            f"{path} is truncated or padded: {len(data)} bytes of {expected['bytes']}"
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs)")
    return load(data)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
