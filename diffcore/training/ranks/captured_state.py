"""The state of a network and its optimizer by parameter name, captured and restored.

It is either gathered on the first rank, or left in the shards that the ranks hold.
torch.distributed.checkpoint gathers and scatters sharded tensors.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from diffcore.training.optimization.quantised_state import (
    capture_quantised_state,
    is_quantised,
    restore_quantised_state,
)
from diffcore.training.ranks.sharding import local

__all__ = [
    "IMPLEMENTATION",
    "CapturedState",
    "capture_state",
    "restore_state",
    "without_shared_memory",
]

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
IN_PLACE = StateDictOptions()
IMPLEMENTATION = ("foreach", "fused")
"""Options of torch's optimizers that choose an implementation of the same formula."""
NamedTensors = dict[str, Tensor]


class CapturedState(NamedTuple):
    """The state of a network and its optimizer.

    Args:
        network: tensors by parameter name.
        optimizer: tensors by "parameter.key".
        groups: options of the optimizer's parameter groups.
    """

    network: NamedTensors
    optimizer: NamedTensors
    groups: list[dict[str, Any]]


def capture_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, is_gathered: bool = True
) -> CapturedState:
    """Capture the state of a network and its optimizer. Every rank must call it.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.
        is_gathered: true gathers whole tensors on the host of the first rank; the other ranks
            receive nothing. False returns the tensors of this rank themselves, which training
            changes.

    Returns:
        The state.
    """
    options = GATHERED if is_gathered else IN_PLACE
    if is_quantised(optimizer):
        return _capture_quantised(network, optimizer, options)
    model, state = get_state_dict(network, optimizer, options=options)
    # Ranks other than the first receive nothing.
    by_parameter = cast("dict[str, NamedTensors]", state.get("state", {}))
    flat = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, values in by_parameter.items()
        for key, value in values.items()
    }
    groups = cast("list[dict[str, Any]]", state.get("param_groups", []))
    return CapturedState(without_shared_memory(cast("NamedTensors", model)), flat, _plain(groups))


def _capture_quantised(
    network: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions
) -> CapturedState:
    get_optimizer_state_dict(network, optimizer)  # takes a step without gradient if there is none
    model = get_model_state_dict(network, options=options)
    state = capture_quantised_state(network, optimizer)
    names = {value: name for name, value in network.named_parameters()}
    groups = [
        group | {"params": [names[value] for value in group["params"]]}
        for group in optimizer.param_groups
    ]
    whole = without_shared_memory(cast("NamedTensors", model))
    return CapturedState(whole, state, _plain(groups))


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options of groups as plain data; some optimizers keep the learning rate in a tensor."""
    return [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in groups
    ]


def _restore_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if isinstance(group[key], Tensor):
                group[key].fill_(value)
            elif key != "params":
                group[key] = type(group[key])(value) if group[key] is not None else value


def without_shared_memory(tensors: NamedTensors) -> NamedTensors:
    """Tensors of which each has its own memory: safetensors does not store a shared one.

    Args:
        tensors: tensors by name.

    Returns:
        The tensors; those that share the memory of an earlier one are copies.
    """
    seen: set[int] = set()
    copies = {}
    for name, value in tensors.items():
        address = local(value).untyped_storage().data_ptr()
        copies[name] = value.clone() if address in seen else value
        seen.add(address)
    return copies


def restore_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: CapturedState,
    is_gathered: bool = True,
) -> None:
    """Restore the state of a network and its optimizer. Every rank must call it.

    The optimizer keeps its own implementation, such as a fused one.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.
        state: state as `capture_state` returned it, on the first rank if it is gathered; every rank
            passes it.
        is_gathered: whether the state is gathered.
    """
    options = GATHERED if is_gathered else IN_PLACE
    # The ranks exchange the tensors one by one, and safetensors reads them in no fixed order.
    weights = cast("Any", dict(sorted(state.network.items())))
    if not state.optimizer:  # SGD without momentum has no tensors, which torch does not expect
        set_model_state_dict(network, weights, options=options)
        return
    if is_quantised(optimizer):
        restore_quantised_state(network, optimizer, state.optimizer)
        _restore_groups(optimizer, state.groups)
        set_model_state_dict(network, weights, options=options)
        return
    by_parameter: dict[str, Any] = {}
    for name, value in sorted(state.optimizer.items()):
        parameter, key = name.rsplit(".", 1)
        by_parameter.setdefault(parameter, {})[key] = value
    own = optimizer.param_groups[0]
    implementation = {key: own[key] for key in IMPLEMENTATION if key in own}
    groups = [group | implementation for group in state.groups]
    set_state_dict(
        network,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=cast("Any", {"state": by_parameter, "param_groups": groups}),
        options=options,
    )
