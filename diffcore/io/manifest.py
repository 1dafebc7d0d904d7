"""The manifest of a checkpoint, and the files whose size and SHA-256 it holds."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from diffcore.io.files import CorruptFileError
from diffcore.io.network_size import check_memory
from diffcore.io.plain_data import hash_data, read_json
from diffcore.io.safetensors import check_header

__all__ = ["MANIFEST", "NAME", "checkpoint_folders", "read_manifest", "read_tensors"]

MANIFEST = "manifest.json"
NAME = r"step-\d{8}"
"""Regular expression of the names of checkpoints; other names belong to the user."""


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """List the checkpoints in a folder: the names `step-` and eight digits, oldest first.

    Args:
        folder: folder of the checkpoints; it need not exist.

    Returns:
        The paths of the checkpoints, whole or not.

    Raises:
        OSError: The folder cannot be read.
    """
    folder = Path(folder)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(NAME, path.name))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Args:
        folder: folder of the checkpoint.

    Returns:
        `files`, the size and the SHA-256 of each file by its name, and `state`, the training state.

    Raises:
        CorruptFileError: the manifest is missing, changed, or describes no checkpoint.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path} cannot be read ({type(error).__name__})") from None
    if digest != hash_data(manifest):
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs)")
    files, state = manifest.get("files"), manifest.get("state")
    is_known = isinstance(files, dict) and all(map(_is_entry, files.items()))
    if not (is_known and isinstance(state, dict) and isinstance(state.get("step"), int)):
        raise CorruptFileError(f"{path} describes no checkpoint")
    return manifest


def _is_entry(entry: tuple[str, Any]) -> bool:
    """Whether an entry of a manifest has a file of its folder, its size and its hash."""
    file, expected = entry
    known = isinstance(expected, dict) and {"bytes", "sha256"} <= expected.keys()
    return known and Path(file).name == file and file.endswith(".safetensors")


def read_tensors(path: str | Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a file of a checkpoint and verify every byte.

    Args:
        path: path of the file.
        expected: its entry in the manifest.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CorruptFileError: the file is missing, truncated or changed.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        check_memory(size, str(path))
        data = path.read_bytes() if size == expected["bytes"] else b""
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CorruptFileError(str(error)) from None
    if size != expected["bytes"]:
        raise CorruptFileError(
            f"{path} is truncated or padded: {size} bytes of {expected['bytes']}"
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs)")
    check_header(path)
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptFileError(f"{path} holds no tensors ({error})") from None
