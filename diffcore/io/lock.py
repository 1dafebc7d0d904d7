"""A lock on a folder: one process at a time writes in it."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

__all__ = ["lock_folder", "wait_for_lock"]

NAME = ".lock"
POLL_SECONDS = 0.1
MESSAGE_SECONDS = 10.0
"""Time after which a process reports that it waits."""


@contextmanager
def lock_folder(folder: str | Path, message: Callable[[str], None]) -> Iterator[None]:
    """Context in which no other process can lock a folder.

    The operating system releases the lock when its process ends, however that happens. A folder
    that does not exist is created, and removed again if it is empty at the end.

    Args:
        folder: folder to lock.
        message: prints a line if an earlier process ended without releasing the lock, or if the
            file system has no locks.

    Yields:
        Nothing.

    Raises:
        ValueError: Another process holds the lock, and the message contains its number and host;
            or the file of the lock is a link, which would be overwritten elsewhere.
    """
    folder = Path(folder)
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder, message)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):  # the folder may have been deleted meanwhile
            (folder / NAME).unlink()
        file.close()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def wait_for_lock(path: str | Path, work: str) -> Iterator[None]:
    """Context of work that one process does while others wait for its result.

    It saves work, and does not guarantee that only one process is inside: where a file cannot be
    locked, nobody waits.

    Args:
        path: file to lock; it is created, and removed at the end.
        work: noun phrase for the message to a process that waits for long.

    Yields:
        Nothing.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError:
        yield
        return
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        _wait(file, work)
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(path)


def _wait(file: IO[str], work: str) -> None:
    """Wait until a file can be locked."""
    deadline = time.monotonic() + MESSAGE_SECONDS
    while True:
        try:
            return _lock(file)
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
        except OSError:
            return None
        if time.monotonic() > deadline:
            print(f"diffcore: waiting for {work} by another process", file=sys.stderr)
            deadline = math.inf


def _acquire(folder: Path, message: Callable[[str], None]) -> IO[str]:
    """The locked file, which contains the holder of the lock."""
    path = folder / NAME
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.readlink()}, expected a file: remove it")
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError:
            with file:
                holder = _read_holder(file)
            raise ValueError(
                f"{folder} is in use by {holder}: wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            message(
                f"{folder} cannot be locked ({error.strerror}): start no second run in this folder"
            )
            return file
        if _is_current(file, path):
            break
        file.close()  # its holder deleted it between opening and locking
    if file.tell():
        message(f"{_read_holder(file)} ended without releasing {folder}: its lock is taken over")
    file.truncate(0)
    started = datetime.now().isoformat(" ", "seconds")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, file)
    file.flush()
    return file


def _lock(file: IO[str]) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_current(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read(1 << 16))
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
