"""Checkpoints: safetensors and JSON only, atomic, and every file hashed.

    checkpoints/step-00000400/model.safetensors
                              ema.safetensors
                              training.safetensors
                              manifest.json

A folder is written under a temporary name, flushed, and renamed, so that a folder with that name is
complete. manifest.json holds the training state, and the size and SHA-256 of each file and of
itself, so that every flipped bit is detected. Folders with other names are left alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from diffcore.io.files import (
    CorruptFileError,
    WriteError,
    remove_leftovers,
    replace_folder,
    write_and_sync,
)
from diffcore.io.manifest import MANIFEST, NAME, checkpoint_folders, read_manifest, read_tensors
from diffcore.io.plain_data import hash_data

__all__ = [
    "Checkpoint",
    "name",
    "newest",
    "prune",
    "read",
    "set_aside",
    "write",
]


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Args:
        tensors: tensors by name, for each file name.
        state: plain data beside them.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder atomically, in place of one with that name.

    Args:
        folder: folder to write.
        checkpoint: content.

    Raises:
        WriteError: The folder cannot be written; the older checkpoints are kept.
    """

    def write_files(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        files = {}
        for file, tensors in checkpoint.tensors.items():
            data = save({key: value.contiguous() for key, value in tensors.items()})
            write_and_sync(temporary / file, data)
            files[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"state": checkpoint.state, "files": files}
        content = {**manifest, "sha256": hash_data(manifest)}
        write_and_sync(temporary / MANIFEST, json.dumps(content, indent=1).encode())

    try:
        replace_folder(folder, write_files)
    except WriteError as error:
        kept = ", ".join(path.name for path in checkpoint_folders(Path(folder).parent)) or "none"
        raise WriteError(f"{error} (whole checkpoints: {kept})") from None


def read(folder: str | Path) -> Checkpoint:
    """Read the checkpoint in `folder` and verify every byte.

    Returns:
        The tensors and the state that `write` stored.

    Raises:
        CorruptFileError: A file is missing, truncated or changed; the message contains its path.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    return Checkpoint(
        {
            file: read_tensors(folder / file, expected)
            for file, expected in manifest["files"].items()
        },
        manifest["state"],
    )


def newest(folder: str | Path, message: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: folder of the checkpoints.
        message: prints a line for each newer checkpoint that is corrupt.

    Returns:
        The checkpoint, or None if there is no whole one.
    """
    for path in reversed(checkpoint_folders(folder)):
        try:
            found = read(path)
            if name(found.state["step"]) == path.name:
                return found
            raise CorruptFileError(f"{path} holds the checkpoint of step {found.state['step']}")
        except CorruptFileError as error:
            message(f"{error}; going back to the checkpoint before it")
    return None


def set_aside(folder: str | Path, step: int) -> None:
    """Rename the corrupt checkpoints after `step`, so that `prune` does not count them."""
    for path in checkpoint_folders(folder):
        if path.name > name(step):
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def name(step: int) -> str:
    """The folder name of a checkpoint, by its number of steps; the names sort like the numbers."""
    return f"step-{step:08d}"


def prune(folder: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the remains of interrupted writes."""
    for path in checkpoint_folders(folder)[: -keep or None]:
        shutil.rmtree(path)
    remove_leftovers(folder, NAME)
