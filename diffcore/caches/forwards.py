"""Modules whose forward is replaced for the evaluations of one thread.

`torch` calls `forward` of a module after its hooks, and no hook can leave it out. The attribute is
therefore replaced while a thread needs it. Other threads that evaluate the same network meanwhile
get the original, and the network is unchanged afterwards, so that it can be copied and pickled.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

__all__ = ["Replacement", "replace_forwards"]

Replacement = Callable[..., Any]
"""Called in place of a forward, with the original forward as first argument."""

_LOCK = threading.Lock()
"""Held while attributes are replaced or restored."""
_USERS: dict[nn.Module, int] = {}
"""Module whose forward is replaced -> number of threads that need it."""
_ACTIVE: ContextVar[Mapping[nn.Module, Replacement]] = ContextVar("replacements")


@contextmanager
def replace_forwards(replacements: Mapping[nn.Module, Replacement]) -> Iterator[None]:
    """Replace the forwards of modules in this thread, in a `with` block.

    Args:
        replacements: module -> function (original forward, *args, **kwargs) -> output.

    Yields:
        None.
    """
    with _LOCK:
        for module in replacements:
            _USERS[module] = _USERS.get(module, 0) + 1
            if _USERS[module] == 1:
                _dispatch(module)
    token = _ACTIVE.set(replacements)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        with _LOCK:
            for module in replacements:
                _USERS[module] -= 1
                if not _USERS[module]:
                    del _USERS[module]
                    _restore(module)


def _dispatch(module: nn.Module) -> None:
    """Let the forward of a module call the replacement of the thread, if there is one."""
    own = module.__dict__.get("forward")
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        replacement = _ACTIVE.get({}).get(module)
        if replacement is None:
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    forward.own = own  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward


def _restore(module: nn.Module) -> None:
    own = module.__dict__.pop("forward").own
    if own is not None:
        module.__dict__["forward"] = own
