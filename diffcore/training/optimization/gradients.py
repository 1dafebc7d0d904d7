"""Gradients of an optimizer step: accumulated over micro-batches, clipped, dropped if not finite.

Nothing here waits for the device.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffcore.training.data.order import Batch
from diffcore.training.ranks.sharding import local, set_gradient_reduction

__all__ = [
    "Buffers",
    "accumulate",
    "clip_gradient",
    "copy_buffers",
    "frozen",
    "keep_finite_buffers",
    "zero_non_finite_gradient",
]

Buffers = list[tuple[Tensor, Tensor]]
"""Every buffer of some modules, such as a running mean, and a copy of its value."""


def accumulate(
    accelerator: Accelerator,
    modules: nn.ModuleList,
    optimizer: Any,
    batches: Iterable[Batch],
    losses: Callable[[int, Batch], Tensor],
    on_gradient: Callable[[], None],
) -> Tensor:
    """Take one optimizer step with the gradient of some micro-batches.

    Args:
        accelerator: accelerator of this rank.
        modules: modules that the optimizer trains, as accelerate wrapped them.
        optimizer: accelerate's optimizer.
        batches: micro-batches of this rank, as many as the accumulation.
        losses: losses (B,) of a micro-batch, of which it receives the index in the step too.
        on_gradient: called between the last backward pass and the step.

    Returns:
        Losses (samples,) of this rank.
    """
    found = []
    for part, batch in enumerate(batches):
        with accelerator.accumulate(*modules):
            set_gradient_reduction(modules, accelerator.sync_gradients)
            loss = losses(part, batch)
            accelerator.backward(loss.mean())
            if accelerator.sync_gradients:
                on_gradient()
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.detach())
    return torch.cat(found)


def clip_gradient(accelerator: Accelerator, modules: nn.Module, clip: float) -> Tensor:
    """Scale the gradient of a step down to the largest norm of the settings.

    Args:
        accelerator: accelerator of this rank.
        modules: modules whose gradients are changed in place.
        clip: largest norm.

    Returns:
        () norm before, over all ranks.
    """
    norm: Tensor = accelerator.clip_grad_norm_(modules.parameters(), clip)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def zero_non_finite_gradient(modules: nn.Module) -> None:
    """Set a clipped gradient whose norm is not finite to zero as a whole.

    Clipping has multiplied it by clip/norm: NaN everywhere if the norm is NaN, zero and NaN if it
    is infinite.

    Args:
        modules: modules whose gradients are changed in place.
    """
    for parameter in modules.parameters():
        if parameter.grad is not None:
            local(parameter.grad).nan_to_num_(0.0, 0.0, 0.0)


def copy_buffers(modules: nn.Module) -> Buffers:
    """Copy the buffers of modules before a step.

    Args:
        modules: modules that are trained.

    Returns:
        The buffers and their copies.
    """
    return [(value, value.clone()) for value in modules.buffers()]


@torch.no_grad()
def keep_finite_buffers(buffers: Buffers, norm: Tensor) -> Tensor:
    """Set the buffers back after a step that was not finite.

    Args:
        buffers: buffers and their values before the step.
        norm: () gradient norm of the step.

    Returns:
        The norm; NaN if a buffer was not finite.
    """
    if not buffers:
        return norm
    is_finite = torch.stack([norm.isfinite(), *(value.isfinite().all() for value, _ in buffers)])
    for value, before in buffers:
        value.copy_(torch.where(is_finite.all(), value, before))
    return torch.where(is_finite.all(), norm, torch.nan)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which modules are in evaluation mode and receive no gradient.

    Args:
        modules: modules, which are as before on exit.

    Yields:
        Nothing; the modules are changed in place.
    """
    every = list({each: each.training for top in modules for each in top.modules()}.items())
    trained = [p for each, _ in every for p in each.parameters(False) if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    for each, _ in every:
        each.training = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for each, mode in every:
            each.training = mode
