"""Faults of file operations: one that fails, as on a full disk, or a process that is killed."""

import builtins
import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from diffcore.io import files

OPERATIONS = (
    *((os, name) for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "open")),
    (io, "open"),
    (builtins, "open"),
    (files, "_exchange"),
)


class KilledError(BaseException):
    """The process is killed: no later operation takes place either."""


class Faults:
    """Counts file operations, and lets one of them fail.

    Args:
        position: number of operations before the one that fails.
        killed: whether all operations after it fail too.
    """

    def __init__(self, position: int, killed: bool) -> None:
        self.position, self.killed, self.count, self.happened = position, killed, 0, False

    def __call__(self, operation: Any, *arguments: Any, **options: Any) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.position or (self.killed and number > self.position):
            self.happened = True
            raise KilledError if self.killed else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return operation(*arguments, **options)


@contextmanager
def fault(position: int, killed: bool) -> Iterator[Faults]:
    """Context in which the operation after `position` others fails."""
    faults = Faults(position, killed)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, _with_faults(faults, getattr(module, name)))
        with suppress(KilledError):
            yield faults


def _with_faults(faults: Faults, operation: Any) -> Any:
    return lambda *arguments, **options: faults(operation, *arguments, **options)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Context in which no file can have more than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
