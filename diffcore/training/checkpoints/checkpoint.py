"""Checkpoints: safetensors and JSON only, atomic, and every file hashed.

    checkpoints/step-00000400/model.safetensors
                              ema.safetensors
                              training.safetensors
                              manifest.json

A folder is written under a temporary name, flushed, and renamed, so that a folder with that name is
complete. manifest.json holds the training state, and the size and SHA-256 of each file and of
itself, so that every flipped bit is detected. Folders with other names are left alone.
`sharded` describes the files of a checkpoint to which each rank writes its own part.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safetensors.torch import save
from torch import Tensor

from diffcore.io.files import (
    CorruptFileError,
    WriteError,
    remove_leftovers,
    replace_folder,
    write_and_sync,
)
from diffcore.io.manifest import (
    MANIFEST,
    NAME,
    check_shards,
    checkpoint_folders,
    is_sharded,
    read_manifest,
    read_tensors,
    verify_shards,
)
from diffcore.io.plain_data import hash_data

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "name",
    "newest",
    "prune",
    "read",
    "replace_checkpoint",
    "set_aside",
    "write",
    "write_entry",
    "write_manifest",
]


@dataclass(frozen=True)
class Checkpoints:
    """How the checkpoints of a run are written. The settings may change when a run resumes.

    With the defaults each checkpoint comes with the averaged weights and the pipeline of the run.
    Otherwise these are written at the end of the run, and until then `diffcore sample` reads the
    newest checkpoint.

    Args:
        format: gathered (the first rank gathers everything and writes it) or sharded (each rank
            writes the part that it holds; no rank needs memory for the whole).
        asynchronous: true copies the state to the memory of the host, and writes it while training
            continues; false waits for the disk.

    Raises:
        ValueError: `format` is not one of the two values.
    """

    format: Literal["gathered", "sharded"] = "gathered"
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("gathered", "sharded"):
            raise ValueError(f"checkpoints.format is {self.format!r}, expected gathered or sharded")

    @property
    def has_outputs(self) -> bool:
        """Whether each checkpoint comes with the averaged weights and the pipeline of the run."""
        return self == Checkpoints()


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Args:
        tensors: tensors by name, for each file name; none if the checkpoint is sharded.
        state: plain data beside them.
        shards: folder of a sharded checkpoint, from which each rank reads its own shards.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    shards: str | Path | None = None


def write(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a gathered checkpoint atomically, in place of one with that name.

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
            files[file] = write_entry(temporary / file, data)
        write_manifest(temporary, {"state": checkpoint.state, "files": files})

    replace_checkpoint(folder, write_files)


def write_entry(path: str | Path, data: bytes) -> dict[str, Any]:
    """Write a file of a checkpoint, and flush it to the disk.

    Args:
        path: file to write.
        data: content.

    Returns:
        Its entry in the manifest: the size in bytes and the SHA-256.
    """
    write_and_sync(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint, with its own hash.

    Args:
        folder: folder whose files are written already.
        manifest: plain data: state, files and, for a sharded checkpoint, format.
    """
    content = {**manifest, "sha256": hash_data(manifest)}
    write_and_sync(Path(folder) / MANIFEST, json.dumps(content, indent=1).encode())


def replace_checkpoint(folder: str | Path, write_files: Callable[[Path], object]) -> None:
    """Give a checkpoint its name once it is complete.

    Args:
        folder: folder to write.
        write_files: function that creates the folder at the temporary path that it receives.

    Raises:
        WriteError: The folder cannot be written; the older checkpoints are kept.
    """
    try:
        replace_folder(folder, write_files)
    except WriteError as error:
        kept = ", ".join(path.name for path in checkpoint_folders(Path(folder).parent)) or "none"
        raise WriteError(f"{error} (whole checkpoints: {kept})") from None


def read(folder: str | Path, accelerator: "Accelerator | None" = None) -> Checkpoint:
    """Read the checkpoint in `folder` and verify every byte.

    Args:
        folder: folder of the checkpoint.
        accelerator: accelerator of this rank, if every rank calls the function. The ranks then
            share the verification of a sharded checkpoint.

    Returns:
        The tensors and the state that were written. Tensors of a sharded checkpoint are verified
        but not read.

    Raises:
        CorruptFileError: A file is missing, truncated or changed; the message contains its path.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if is_sharded(manifest):
        _verify_shards(folder, manifest, accelerator)
        return Checkpoint({}, manifest["state"], folder)
    return Checkpoint(
        {
            file: read_tensors(folder / file, expected)
            for file, expected in manifest["files"].items()
        },
        manifest["state"],
    )


def _verify_shards(
    folder: Path, manifest: Mapping[str, Any], accelerator: "Accelerator | None"
) -> None:
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    reasons = [""]
    try:
        check_shards(folder, manifest)
        verify_shards(folder, manifest, sorted(manifest["files"])[rank::ranks])
    except CorruptFileError as error:
        reasons = [str(error)]
    if accelerator:
        from accelerate.utils import gather_object

        reasons = gather_object(reasons)
    for reason in filter(None, reasons):
        raise CorruptFileError(reason)


def newest(
    folder: str | Path, message: Callable[[str], None], accelerator: "Accelerator | None" = None
) -> Checkpoint | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: folder of the checkpoints.
        message: prints a line for each newer checkpoint that is corrupt.
        accelerator: accelerator of this rank, if every rank calls the function.

    Returns:
        The checkpoint, or None if there is no whole one.
    """
    for path in reversed(checkpoint_folders(folder)):
        try:
            found = read(path, accelerator)
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
