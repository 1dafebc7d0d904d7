"""Atomic writes of files and folders, and hashes of files."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "CorruptFileError",
    "hash_file",
    "sync_folder",
    "write_and_sync",
    "write_file",
    "write_folder",
]


class CorruptFileError(ValueError):
    """A file is missing, truncated, or differs from what diffcore wrote."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content.

    Args:
        path: file to read.

    Returns:
        The hash, 64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: after an interruption it has either its old content or the new one.

    Args:
        path: file to write or replace; its folder must exist.
        data: new content of the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_and_sync(temporary, data)
    temporary.rename(path)
    sync_folder(path.parent)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder that gets its name only once it is complete; an older one is replaced.

    Args:
        folder: folder to write or replace.
        write: function that creates the folder at the temporary path that it receives.
    """
    for path in folder.parent.glob(f".{folder.name}.*"):
        if path.suffix[1:].isdigit():  # an interrupted write left it
            shutil.rmtree(path)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a file and wait until its content is on the disk.

    Args:
        path: file to write.
        data: content of the file.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where they survive a power failure.

    Args:
        folder: folder whose entries were created or renamed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
