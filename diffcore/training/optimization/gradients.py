"""Gradients of an optimizer step: accumulated over micro-batches, clipped, dropped if not finite.

Nothing here waits for the device.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from diffcore.training.data.order import Batch
from diffcore.training.ranks.sharding import local, set_gradient_reduction

__all__ = ["apply_gradient", "frozen", "take_step"]

CLIP_EPSILON = 1e-6
"""Added to the norm by which a gradient is divided, as `torch.nn.utils.clip_grad_norm_` does."""
Buffers = list[tuple[Tensor, Tensor]]
"""Every buffer of some modules, such as a running mean, and a copy of its value."""
OnGradient = Callable[[Tensor], object]
"""Receives the norm () of the gradient of a step, between the backward pass and the step."""


def take_step(
    accelerator: Accelerator,
    modules: nn.ModuleList,
    optimizer: Any,
    batches: Iterable[Batch],
    losses: Callable[[int, Batch], Tensor],
    clip: float,
    on_gradient: OnGradient = lambda norm: None,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step with the gradient of some micro-batches.

    A step that is not finite changes no buffer, and the parameters as `apply_gradient` describes.

    Args:
        accelerator: accelerator of this rank.
        modules: modules that the optimizer trains, as accelerate wrapped them.
        optimizer: accelerate's optimizer.
        batches: micro-batches of this rank, as many as the accumulation.
        losses: losses (B,) of a micro-batch, of which it receives the index in the step too.
        clip: largest norm of the gradient.
        on_gradient: called with the norm before the step.

    Returns:
        Losses (samples,) of this rank, and the norm () of the gradient over all ranks before
        clipping; NaN if a buffer was not finite.
    """
    buffers, found = copy_buffers(modules), []
    for part, batch in enumerate(batches):
        with accelerator.accumulate(*modules):
            set_gradient_reduction(modules, accelerator.sync_gradients)
            loss = losses(part, batch)
            accelerator.backward(loss.mean())
            if accelerator.sync_gradients:
                norm = apply_gradient(accelerator, optimizer, clip, on_gradient)
        found.append(loss.detach())
    return torch.cat(found), _keep_finite_buffers(buffers, norm)


def apply_gradient(
    accelerator: Accelerator,
    optimizer: Any,
    clip: float,
    on_gradient: OnGradient = lambda norm: None,
) -> Tensor:
    """Clip the gradient, take the step of the optimizer, and remove the gradient.

    If the norm is not finite, torch's fused Adam and AdamW skip the step: parameters, moments and
    step counts stay. They clip within the step, so that no further pass over the gradient is
    needed. Any other optimizer takes a step with zero gradient.

    Args:
        accelerator: accelerator of this rank.
        optimizer: accelerate's optimizer, whose parameters have the gradient of the step.
        clip: largest norm of the gradient.
        on_gradient: called with the norm before the step.

    Returns:
        () norm before clipping, over all ranks.
    """
    # A walk through the modules would take longer than the norm of their gradient.
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    context: AbstractContextManager[None]
    if _clips_within_step(optimizer.optimizer):
        accelerator.unscale_gradients(optimizer)
        norm = _whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        context = _clipping(optimizer.optimizer, norm, clip)
    else:
        norm = _whole(accelerator.clip_grad_norm_(parameters, clip))
        _zero_non_finite_gradient(parameters)
        context = nullcontext()
    on_gradient(norm)
    with context:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def _clips_within_step(optimizer: Optimizer) -> bool:
    """Whether a step reads `grad_scale` and `found_inf`, as torch's fused Adam and AdamW do.

    A subclass or the kernel of another device could ignore them, and torch's fused SGD leaves its
    momentum without a value if its first step is skipped.
    """
    groups = optimizer.param_groups
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        and all(group.get("fused") for group in groups)
        and groups[0]["params"][0].device.type in ("cpu", "cuda")
    )


@contextmanager
def _clipping(optimizer: Any, norm: Tensor, clip: float) -> Iterator[None]:
    """Context in which a step divides the gradient, and is skipped if the norm is not finite."""
    optimizer.grad_scale = ((norm.float() + CLIP_EPSILON) / clip).clamp(min=1.0)
    optimizer.found_inf = norm.isfinite().logical_not().float()
    try:
        yield
    finally:  # the scaler of fp16 has removed them already
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _zero_non_finite_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Set a clipped gradient whose norm is not finite to zero as a whole.

    Clipping has multiplied it by clip/norm: NaN everywhere if the norm is NaN, zero and NaN if it
    is infinite.
    """
    for parameter in parameters:
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
def _keep_finite_buffers(buffers: Buffers, norm: Tensor) -> Tensor:
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
