"""The state of an 8-bit optimizer by parameter, stored exactly: codes, scales and tables.

torch.distributed.checkpoint does not gather these states: bitsandbytes hides them in a dictionary
of its own, and those of torchao are tensors that consist of several tensors, which are stored as
"parameter.key/part". They belong to one rank's whole parameters and not to shards.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["capture_quantised_state", "is_quantised", "restore_quantised_state"]

PACKAGES = ("bitsandbytes", "torchao")


def is_quantised(optimizer: Optimizer) -> bool:
    """Whether an optimizer is of a package that quantises the state of optimizers."""
    return type(optimizer).__module__.partition(".")[0] in PACKAGES


def capture_quantised_state(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copy the state of an optimizer to the host.

    Args:
        network: module whose parameters the optimizer trains; not sharded.
        optimizer: optimizer for which `is_quantised` holds.

    Returns:
        Tensors by "parameter.key" or "parameter.key/part".

    Raises:
        ValueError: The parameters are sharded.
    """
    captured = {}
    for name, parameter in network.named_parameters():
        _check_whole(parameter, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items():
            for part, tensor in _parts(value).items():
                captured[f"{name}.{key}{part}"] = tensor.detach().cpu().clone()
    return captured


def restore_quantised_state(
    network: nn.Module, optimizer: Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Restore what `capture_quantised_state` returned, in place.

    Args:
        network: module whose parameters the optimizer trains. Its weights may change: load them
            afterwards.
        optimizer: optimizer built with the same options.
        state: captured tensors.

    Raises:
        KeyError: The state is that of another optimizer.
    """
    get_optimizer_state_dict(network, optimizer)  # takes a step without gradient if there is none
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = optimizer.state.get(parameter, {})
            for key, value in values.items():
                if isinstance(value, Tensor):
                    for part, tensor in _parts(value).items():
                        tensor.copy_(state[f"{name}.{key}{part}"])
                else:
                    values[key] = type(value)(state[f"{name}.{key}"].item())


def _parts(value: Any) -> dict[str, Tensor]:
    """The plain tensors of which a value consists, by the end of their name."""
    if is_traceable_wrapper_subclass(value):
        attributes, _ = value.__tensor_flatten__()
        return {f"/{attribute}": getattr(value, attribute) for attribute in attributes}
    return {"": torch.as_tensor(value)}


def _check_whole(parameter: nn.Parameter, optimizer: Optimizer) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"the optimizer {type(optimizer).__name__} has a quantised state, which is not stored "
            "for sharded parameters: use torch.optim.AdamW, or train without sharding"
        )
