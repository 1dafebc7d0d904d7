"""The integration that an evaluation belongs to: what a cache keeps is kept for one of them.

`integrate` opens an integration in its thread, so that what is kept is empty at its start, is
forgotten at its end, and is not shared by threads. Outside of an integration there is nothing to
reuse, and caches evaluate the whole network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Integration", "current_integration", "integration", "no_integration", "part"]


class Integration:
    """One integration from the first knot to the last."""

    def __init__(self) -> None:
        self.memory: dict[object, Any] = {}
        """What caches keep, by cache and part of the batch."""
        self.part = 0
        """Number of the call of the network among those that evaluate one batch in parts."""


_CURRENT: ContextVar[Integration | None] = ContextVar("integration", default=None)


def current_integration() -> Integration | None:
    """The integration that this thread is in.

    Returns:
        The integration; None outside of one.
    """
    return _CURRENT.get()


@contextmanager
def integration() -> Iterator[None]:
    """Open an integration in this thread, for a `with` block or as decorator of a function.

    Yields:
        None.
    """
    token = _CURRENT.set(Integration())
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def no_integration() -> Iterator[None]:
    """Evaluate whole networks in a `with` block, such as one whose layers are altered.

    Yields:
        None.
    """
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def part(index: int) -> None:
    """Set the number of the next call of the network, which evaluates a part of the batch.

    Args:
        index: number of the part, from 0.
    """
    current = _CURRENT.get()
    if current is not None:
        current.part = index
