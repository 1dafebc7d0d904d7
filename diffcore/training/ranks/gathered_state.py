"""The whole state of a network and its optimizer, gathered on the first rank and restored on all.

torch.distributed.checkpoint gathers and scatters sharded tensors.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from diffcore.training.optimization.quantised_state import (
    capture_quantised_state,
    is_quantised,
    restore_quantised_state,
)

__all__ = ["GatheredState", "capture_state", "restore_state"]

FULL_ON_HOST = StateDictOptions(full_state_dict=True, cpu_offload=True)
NamedTensors = dict[str, Tensor]


class GatheredState(NamedTuple):
    """The whole state of networks and optimizer on the host.

    Args:
        network: tensors by parameter name.
        optimizer: tensors by "parameter.key".
        groups: options of the optimizer's parameter groups.
    """

    network: NamedTensors
    optimizer: NamedTensors
    groups: list[dict[str, Any]]


def capture_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> GatheredState:
    """Gather the whole state of a network and its optimizer. Every rank must call it.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.

    Returns:
        The state on the host of the first rank; the other ranks receive nothing.
    """
    if is_quantised(optimizer):
        return _capture_quantised(network, optimizer)
    model, state = get_state_dict(network, optimizer, options=FULL_ON_HOST)
    # Ranks other than the first receive nothing.
    by_parameter = cast("dict[str, NamedTensors]", state.get("state", {}))
    flat = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, values in by_parameter.items()
        for key, value in values.items()
    }
    groups = cast("list[dict[str, Any]]", state.get("param_groups", []))
    return GatheredState(_without_shared_memory(cast("NamedTensors", model)), flat, _plain(groups))


def _capture_quantised(network: nn.Module, optimizer: torch.optim.Optimizer) -> GatheredState:
    model = get_model_state_dict(network, options=FULL_ON_HOST)
    state = capture_quantised_state(network, optimizer)
    names = {value: name for name, value in network.named_parameters()}
    groups = [
        group | {"params": [names[value] for value in group["params"]]}
        for group in optimizer.param_groups
    ]
    whole = _without_shared_memory(cast("NamedTensors", model))
    return GatheredState(whole, state, _plain(groups))


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


def _without_shared_memory(tensors: NamedTensors) -> NamedTensors:
    """Tensors of which each has its own memory: safetensors does not store a shared one."""
    seen: set[int] = set()
    copies = {}
    for name, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        copies[name] = value.clone() if address in seen else value
        seen.add(address)
    return copies


def restore_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: GatheredState
) -> None:
    """Restore the state of a network and its optimizer. Every rank must call it.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.
        state: whole state, as `capture_state` returned it on the first rank; every rank passes it.
    """
    # The ranks exchange the tensors one by one, and safetensors reads them in no fixed order.
    weights = cast("Any", dict(sorted(state.network.items())))
    if not state.optimizer:  # SGD without momentum has no tensors, which torch does not expect
        set_model_state_dict(network, weights, options=FULL_ON_HOST)
        return
    if is_quantised(optimizer):
        restore_quantised_state(network, optimizer, state.optimizer)
        _restore_groups(optimizer, state.groups)
        set_model_state_dict(network, weights, options=FULL_ON_HOST)
        return
    by_parameter: dict[str, Any] = {}
    for name, value in sorted(state.optimizer.items()):
        parameter, key = name.rsplit(".", 1)
        by_parameter.setdefault(parameter, {})[key] = value
    set_state_dict(
        network,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=cast("Any", {"state": by_parameter, "param_groups": state.groups}),
        options=FULL_ON_HOST,
    )
