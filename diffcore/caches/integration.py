"""The integration that an evaluation belongs to: what a cache keeps is kept for one of them.

`integrate` opens an integration in its thread, so that what is kept is empty at its start, is
forgotten at its end, and is not shared by threads. Outside of an integration there is nothing to
reuse, and caches evaluate the whole network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from diffcore.schedules import Level

__all__ = [
    "Integration",
    "LevelPlan",
    "current_integration",
    "integration",
    "no_integration",
    "part",
    "plan_levels",
]

LevelPlan = Callable[[], Sequence[Level] | None]
"""Lists the levels at which an integration evaluates the network, in order; None: not known."""


class Integration:
    """One integration from the first knot to the last.

    Args:
        plan: lists the levels of its evaluations.
    """

    def __init__(self, plan: LevelPlan = lambda: None) -> None:
        self.plan = plan
        self.memory: dict[object, Any] = {}
        """What caches keep, by cache and part of the batch."""
        self.part = 0
        """Number of the call of the network among those that evaluate one batch in parts."""
        self.resources = ExitStack()
        """What caches hold open until the end of the integration."""


_CURRENT: ContextVar[Integration | None] = ContextVar("integration", default=None)


def current_integration() -> Integration | None:
    """The integration that this thread is in.

    Returns:
        The integration; None outside of one.
    """
    return _CURRENT.get()


@contextmanager
def integration(opened: Integration | None = None) -> Iterator[None]:
    """Enter an integration in this thread, for a `with` block or as decorator of a function.

    Args:
        opened: integration whose evaluations are in several blocks; its owner ends it by closing
            its resources. None: a new one, which ends with the block.

    Yields:
        None.
    """
    entered = Integration() if opened is None else opened
    token = _CURRENT.set(entered)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        if opened is None:
            entered.resources.close()


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


def plan_levels(plan: LevelPlan) -> None:
    """Set what the integration of this thread will evaluate; it is listed only if a cache needs it.

    Args:
        plan: lists the levels of the evaluations.
    """
    current = _CURRENT.get()
    if current is not None:
        current.plan = plan
