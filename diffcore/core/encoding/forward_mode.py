"""Forward-mode derivatives of networks: what torch needs for them beside `torch.func.jvp`."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["differentiate_forward"]


def differentiate_forward(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along a direction, by `torch.func.jvp`.

    Both have the gradient of the parameters that the function reads.

    Args:
        function: function of tensors, which may evaluate networks.
        at: arguments of the function.
        tangents: direction, one tensor of the shape of each argument.

    Returns:
        The value, and the derivative, of its shape.

    Raises:
        ValueError: an operation of the network has no derivative in forward mode.

    Example:
        >>> one = torch.ones(1)
        >>> differentiate_forward(torch.square, (3 * one,), (one,))
        (tensor([9.]), tensor([6.]))
    """
    _load_forward_mode()
    try:
        # The fast kernels of attention have no forward mode.
        with sdpa_kernel(SDPBackend.MATH), _contiguous_group_norms():
            value, derivative = torch.func.jvp(function, at, tangents)[:2]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the network has no derivative in forward mode ({error})") from error
    return value, derivative


@contextmanager
def _contiguous_group_norms() -> Iterator[None]:
    """Context in which group norms copy their input, whose tangent torch views as contiguous."""

    def copy(module: nn.Module, arguments: Any) -> Any:
        if not isinstance(module, nn.GroupNorm):
            return None
        return (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])

    handle = register_module_forward_pre_hook(copy)
    try:
        yield
    finally:
        handle.remove()


@cache
def _load_forward_mode() -> None:
    """Let torch load its rules of forward mode, whose scripts warn of a deprecation, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))
