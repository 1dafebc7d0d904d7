"""The size of a network that a file describes, which is checked before memory is taken.

A network is first built on the meta device, where tensors have shapes and no memory. What it
registers is counted on the way, so that a description of a hundred thousand layers ends early.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

__all__ = ["BoundedFactory", "build_without_memory", "check_memory", "machine_memory"]

MAXIMUM_MODULES = 20_000
"""Largest number of modules, parameters and buffers; the networks of diffusers have thousands."""


class _TooLargeError(ValueError):
    """A network has too many modules or too many entries."""


@dataclass
class _Count:
    """What a network under construction has registered.

    Args:
        limit: largest number of entries of its parameters and buffers.
        reason: end of the error message for more entries.
        names: number of modules, parameters and buffers.
        numbers: number of entries of its parameters and buffers.
    """

    limit: int
    reason: str
    names: int = 0
    numbers: int = 0

    def add(self, value: Any) -> None:
        """Count a module, parameter or buffer.

        Raises:
            ValueError: the network is too large.
        """
        self.names += 1
        if self.names > MAXIMUM_MODULES:
            raise _TooLargeError(
                f"the settings describe a network of more than {MAXIMUM_MODULES:,} modules and "
                "parameters: expected a smaller one"
            )
        if isinstance(value, torch.Tensor):
            self.numbers += value.numel()
        if self.numbers > self.limit:
            raise _TooLargeError(
                f"the settings describe a network of {self.numbers:,} numbers or more, "
                f"{self.reason}"
            )


_count: ContextVar[_Count | None] = ContextVar("count", default=None)


def _register(_module: nn.Module, _name: str, value: Any) -> None:
    count = _count.get()
    if count is not None:
        count.add(value)


def machine_memory() -> int:
    """The memory of this machine in bytes; 256 GiB if the system does not provide it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 38


def check_memory(needed: int, what: str) -> None:
    """Check that the memory of this machine could hold something.

    Args:
        needed: number of bytes.
        what: noun for the error message.

    Raises:
        ValueError: it could not.
    """
    if needed > machine_memory():
        raise ValueError(
            f"{what} needs {needed / 1e9:,.0f} GB or more, and this machine has "
            f"{machine_memory() / 1e9:,.0f} GB of memory: expected a smaller size"
        )


@contextmanager
def _counted(count: _Count) -> Iterator[None]:
    """Count what the networks register that are built in the `with` block."""
    hooks = [
        registration.register_module_parameter_registration_hook(_register),
        registration.register_module_buffer_registration_hook(_register),
        registration.register_module_module_registration_hook(_register),
    ]
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)
        for hook in hooks:
            hook.remove()


def build_without_memory(
    build: Callable[[], nn.Module], limit: int = 0, reason: str = ""
) -> nn.Module:
    """Build a network on the meta device, where its tensors have no memory.

    A network whose constructor reads values of tensors is built with memory, within the limit.

    Args:
        build: function that builds the network.
        limit: largest number of entries of its parameters and buffers; 0: as many as this machine
            has memory for in float32.
        reason: end of the error message for more entries.

    Returns:
        The network; its parameters have shapes and no values.

    Raises:
        ValueError: the network has too many modules or too many entries.
    """
    if not limit:
        limit = machine_memory() // 4
        reason = f"and this machine has memory for {limit:,}: expected a smaller one"
    try:
        try:
            with _counted(_Count(limit, reason)), torch.device("meta"):
                return build()
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            # The constructor reads values of tensors. What it registers is still counted.
            with _counted(_Count(limit, reason)):
                return build()
    except _TooLargeError:
        raise
    except Exception as error:  # of the settings, since the network is one of torch or diffusers
        line = " ".join(str(error).split()) or "memory is exhausted"
        raise ValueError(
            f"the network that the settings describe cannot be built: {line}"
        ) from error


@dataclass(frozen=True)
class BoundedFactory:
    """A function that builds a network, and refuses one that is too large for this machine.

    Args:
        build: function that builds the network; it runs on the meta device first.
    """

    build: Callable[[], nn.Module]

    def without_memory(self) -> nn.Module:
        """The network on the meta device.

        Raises:
            ValueError: it is too large for this machine.
        """
        return build_without_memory(self.build)

    def __call__(self) -> nn.Module:
        """The network with newly initialised weights.

        Raises:
            ValueError: it is too large for this machine.
        """
        self.without_memory()
        return self.build()
