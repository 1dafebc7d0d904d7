"""The manifest of a checkpoint, and the files whose size and SHA-256 it holds.

A gathered checkpoint has one file for each part of its state, such as ema.safetensors. A sharded
one has a file of each part and rank, such as ema.rank-00000.safetensors: the rank's shards of the
tensors "ema/NAME", with their offsets in the whole tensors in the header.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from diffcore.io.files import CorruptFileError, hash_file
from diffcore.io.network_size import check_memory
from diffcore.io.plain_data import hash_data, read_json
from diffcore.io.safetensors import check_header

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = [
    "MANIFEST",
    "NAME",
    "SHARDED",
    "check_shards",
    "checkpoint_folders",
    "empty_tensors",
    "is_sharded",
    "load_shards",
    "read_manifest",
    "read_part",
    "read_tensors",
    "verify_shards",
]

MANIFEST = "manifest.json"
SHARDED = "sharded"
"""Value of `format` in the manifest of a sharded checkpoint."""
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
        `files`, the size and the SHA-256 of each file by its name; `state`, the training state; and
        `format`, if the checkpoint is sharded.

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
        _check_size(path, expected)
        check_memory(expected["bytes"], str(path))
        data = path.read_bytes()
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CorruptFileError(str(error)) from None
    _check_hash(path, hashlib.sha256(data).hexdigest(), expected)
    check_header(path)
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptFileError(f"{path} holds no tensors ({error})") from None


def _check_size(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing") from None
    if size != expected["bytes"]:
        raise CorruptFileError(
            f"{path} is truncated or padded: {size} bytes of {expected['bytes']}"
        )


def _check_hash(path: Path, digest: str, expected: Mapping[str, Any]) -> None:
    if digest != expected["sha256"]:
        raise CorruptFileError(f"{path} is not what was written (its SHA-256 differs)")


def is_sharded(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of a sharded checkpoint."""
    return manifest.get("format") == SHARDED


def read_part(folder: str | Path, manifest: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """Read one part of a checkpoint of either format, and verify every byte of it.

    Args:
        folder: folder of the checkpoint.
        manifest: its manifest.
        part: name of the part, such as "ema".

    Returns:
        Whole tensors by name, on the CPU.

    Raises:
        CorruptFileError: the checkpoint has no such part, or a file is missing, truncated or
            changed.
    """
    folder, file = Path(folder), f"{part}.safetensors"
    if not is_sharded(manifest) and file in manifest["files"]:
        return read_tensors(folder / file, manifest["files"][file])
    shards = [name for name in manifest["files"] if name.startswith(f"{part}.rank-")]
    if not is_sharded(manifest) or not shards:
        raise CorruptFileError(f"{folder} holds no {part} weights")
    check_shards(folder, manifest)
    verify_shards(folder, manifest, shards)
    tensors = empty_tensors(folder, f"{part}/")
    load_shards(folder, tensors)
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items()}


def check_shards(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Check that a sharded checkpoint consists of the files of its manifest.

    Args:
        folder: folder of the checkpoint.
        manifest: its manifest.

    Raises:
        CorruptFileError: a file is missing or unknown.
    """
    folder = Path(folder)
    found = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(found ^ manifest["files"].keys()):
        reason = "is missing" if name in manifest["files"] else "is no file of this checkpoint"
        raise CorruptFileError(f"{folder / name} {reason}")


def verify_shards(folder: str | Path, manifest: Mapping[str, Any], names: list[str]) -> None:
    """Verify every byte of some files of a checkpoint, without keeping them in memory.

    Args:
        folder: folder of the checkpoint.
        manifest: its manifest.
        names: names of the files.

    Raises:
        CorruptFileError: a file is missing, truncated or changed.
    """
    for name in names:
        path, expected = Path(folder) / name, manifest["files"][name]
        try:
            _check_size(path, expected)
            _check_hash(path, hash_file(path), expected)
        except OSError as error:
            raise CorruptFileError(f"{path} cannot be read ({error.strerror})") from None
        check_header(path)


def _shard_layout(folder: str | Path) -> "dict[str, TensorStorageMetadata]":
    """The shapes and data types of the tensors of a sharded checkpoint, from the headers.

    Args:
        folder: folder of the checkpoint.

    Returns:
        Shape and type of each whole tensor by "part/name".

    Raises:
        CorruptFileError: a header cannot be read, or the shards of a tensor leave a gap.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptFileError(
            f"{folder} holds no shards of tensors ({type(error).__name__}: {error})"
        ) from None
    for name, tensor in found.items():
        # The reader takes the largest end of a shard for the size of the tensor.
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CorruptFileError(f"{folder} does not hold every shard of {name}")
    return dict(found)


def load_shards(folder: str | Path, tensors: dict[str, Tensor], is_single: bool = True) -> None:
    """Read tensors of a sharded checkpoint, which is verified already.

    Args:
        folder: folder of the checkpoint.
        tensors: tensors by "part/name", whole or sharded, which are changed in place.
        is_single: False if every rank calls the function, each with its own shards.

    Raises:
        CorruptFileError: the checkpoint lacks a tensor, or has it in another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # that no ranks take part
            warnings.simplefilter("ignore")
            load_state(tensors, storage_reader=reader, planner=planner, no_dist=is_single)
    except CheckpointException as error:  # a BaseException
        reason = next(iter(error.failures.values()))[0]
        raise CorruptFileError(f"{folder} cannot be read ({reason})") from None


def empty_tensors(folder: str | Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors on the CPU into which `load_shards` reads.

    Args:
        folder: folder of a sharded checkpoint.
        prefix: beginning of the names "part/name".

    Returns:
        The tensors by these names, not initialised.
    """
    return {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in _shard_layout(folder).items()
        if name.startswith(prefix)
    }
