"""Atomic writes of files and folders, and hashes of files."""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from diffcore.io.plain_data import read_json

__all__ = [
    "HASHES",
    "CorruptFileError",
    "WriteError",
    "check_links",
    "check_writable",
    "hash_file",
    "remove_leftovers",
    "replace_folder",
    "sync_folder",
    "verify_folder",
    "write_and_sync",
    "write_file",
    "write_folder",
]

HASHES = "sha256.json"
"""File of a folder that holds the SHA-256 of its other files, by their paths in it."""
REPLACEMENTS = 10
"""How often a folder that is being read may be replaced by a run that is still training."""
EXCHANGE = 2
"""Flag of the system call renameat2 that swaps two names."""
CURRENT_FOLDER = -100


class CorruptFileError(ValueError):
    """A file is missing, truncated, or differs from what diffcore wrote."""


class WriteError(OSError):
    """A file or folder cannot be written, for example because the disk is full.

    Args:
        message: what cannot be written, what is kept, and the remedy.
        number: number of the system's error.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(errno.EIO if number is None else number, message)

    def __str__(self) -> str:
        return str(self.strerror)


def check_links(folder: str | Path) -> None:
    """Check that no symbolic link in a folder leads out of it.

    The links of a snapshot in the cache of the Hugging Face hub lead to the blobs beside it, which
    belong to it.

    Args:
        folder: folder that somebody else may have made; it may itself be a link.

    Raises:
        ValueError: a link leads out of the folder; the message names it.
    """
    folder = Path(folder)
    roots = [_resolved(folder)]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    for parent, folders, files in os.walk(roots[0]):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not any(_resolved(path).is_relative_to(r) for r in roots):
                raise ValueError(
                    f"{folder / path.relative_to(roots[0])} is a link to {path.readlink()}, which "
                    f"is outside {folder}: replace the link by what it leads to, if you trust it"
                )


def _resolved(path: Path) -> Path:
    """What a path leads to; Path.resolve would raise a RuntimeError for a link to itself."""
    return Path(os.path.realpath(path))


def check_writable(path: str | Path) -> None:
    """Check, before a long computation, that its result can be written.

    Args:
        path: file or folder that will be written; folders that do not exist are created then.

    Raises:
        WriteError: the folder that holds it, or will hold it, is read-only.
    """
    path = Path(path)
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise _write_error(path, PermissionError(errno.EACCES, f"{folder} is read-only"))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content.

    Args:
        path: file to read.

    Returns:
        The hash, 64 hexadecimal digits.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file atomically: after an interruption it has either its old content or the new one.

    Args:
        path: file to write or replace; its folder must exist.
        data: new content of the file.

    Raises:
        WriteError: The file cannot be written; an older one of this name is kept.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        write_and_sync(temporary, data)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # there is none, or it cannot be removed either
            temporary.unlink()
        raise _write_error(path, error) from None


def write_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Replace a folder as `replace_folder` does, with the hashes of its files in sha256.json.

    Args:
        folder: folder to write or replace.
        write: function that creates the folder at the temporary path that it receives.

    Raises:
        WriteError: The folder cannot be written; an older one of this name is kept.
    """

    def write_with_hashes(temporary: Path) -> None:
        write(temporary)
        hashes = {}
        for path in sorted(temporary.rglob("*")):
            sync_folder(path)
            if path.is_file():
                hashes[path.relative_to(temporary).as_posix()] = hash_file(path)
        write_and_sync(temporary / HASHES, json.dumps(hashes, indent=1).encode())

    replace_folder(folder, write_with_hashes)


def verify_folder(folder: str | Path) -> None:
    """Check the files of a folder that `write_folder` wrote; without sha256.json, check nothing.

    Args:
        folder: folder to read.

    Raises:
        CorruptFileError: A file is missing or differs from what was written; the message contains
            its path.
    """
    record = Path(folder) / HASHES
    if not record.is_file():
        return
    hashes, wrong = _read_hashes(record), None
    for _ in range(REPLACEMENTS):
        wrong, before = _find_wrong_file(record, hashes), hashes
        if wrong is None or (hashes := _read_hashes(record)) == before:
            break
    if wrong is not None:
        raise CorruptFileError(
            f"{wrong} is not what was written (its SHA-256 differs): copy it again, or resume its "
            f"run to write it again; if you changed it on purpose, delete {record}"
        )


def _read_hashes(record: Path) -> dict[str, str]:
    try:
        return read_json(record)
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{error}: copy the folder again") from None


def _find_wrong_file(record: Path, hashes: Mapping[str, str]) -> Path | None:
    """The first file of a folder that is missing or has another hash, or None."""
    for name, expected in hashes.items():
        path = record.parent / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CorruptFileError(f"{record} names {name}, which is not a file of its folder")
        if not path.is_file() or hash_file(path) != expected:
            return path
    return None


def replace_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Write a folder that gets its name only once it is complete; an older one is replaced.

    A reader finds the old folder or the new one, both complete. Where the system cannot swap two
    folders in one operation, there is a moment between two renames without a folder of this name;
    `remove_leftovers` repairs an interruption at this moment.

    Args:
        folder: folder to write or replace.
        write: function that creates the folder at the temporary path that it receives.

    Raises:
        WriteError: The folder cannot be written; an older one of this name is kept.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise WriteError(
            f"{folder} is a link, which is not replaced: remove it, or make it a folder"
        )
    remove_leftovers(folder.parent, re.escape(folder.name))
    temporary = _temporary(folder)
    try:
        write(temporary)
        sync_folder(temporary)
        _rename_over(temporary, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, error) from None
    finally:  # the incomplete new folder, or the old one
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: str | Path, *names: str) -> None:
    """Remove the temporary files and folders that writes of dead processes left behind.

    Args:
        folder: folder to search; it need not exist.
        names: names of the files and folders that were to be written, as regular expressions.
    """
    folder = Path(folder)
    pattern = re.compile(rf"\.({'|'.join(names)})\.(\d+)(\.old)?")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[3] and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_and_sync(path: str | Path, data: bytes) -> None:
    """Write a file and wait until its content is on the disk.

    Args:
        path: file to write.
        data: content of the file.
    """
    with Path(path).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk, where they survive a power failure.

    Args:
        folder: folder whose entries were created or renamed, or a file whose content was written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _write_error(path: Path, error: Exception) -> WriteError:
    place = f", {error.filename}" if isinstance(error, OSError) and error.filename else ""
    reason = getattr(error, "strerror", None) or error
    return WriteError(
        f"{path} cannot be written ({reason}{place}): an older one of this name is kept whole; "
        "make room on the disk or allow the access, then repeat the command (of a run: with "
        "--resume auto)",
        getattr(error, "errno", None),
    )


def _rename_over(new: Path, folder: Path) -> None:
    """Give a folder the name of another one, which gets the name of the first."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        aside = new.with_name(f"{new.name}.old")
        folder.rename(aside)
        try:
            new.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        aside.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one operation; False if the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (CURRENT_FOLDER, os.fsencode(first), CURRENT_FOLDER, os.fsencode(second))
    return renameat2 is not None and renameat2(*paths, EXCHANGE) == 0


def _is_alive(process: int) -> bool:
    """Whether another process of this machine has this id."""
    if process == os.getpid() or sys.platform == "win32":  # there, signal 0 would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
