"""What a checkpoint needs of a training network and its optimizer, in plain tensors under the parameters' own names.

The state is whole on every rank's side of the call (sharded or not), and on the host.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
Named = dict[str, Tensor]


def capture(
    network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Named, Named, list[dict[str, Any]]]:
    """The network's tensors, the optimizer's as "parameter.key", and its groups' options. Every rank must call."""
    model, state = get_state_dict(network, optimizer, options=OPTIONS)
    by_parameter = cast("dict[str, Named]", state.get("state", {}))  # empty but on the first rank
    flat = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, own in by_parameter.items()
        for key, value in own.items()
    }
    return cast("Named", model), flat, cast("list[dict[str, Any]]", state.get("param_groups", []))


def restore(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    model: Named,
    flat: Named,
    groups: list[dict[str, Any]],
) -> None:
    """Put back what `capture` took."""
    by_parameter: dict[str, Any] = {}
    for name, value in flat.items():
        parameter, key = name.rsplit(".", 1)
        by_parameter.setdefault(parameter, {})[key] = value
    state = {"state": by_parameter, "param_groups": groups}
    set_state_dict(
        network,
        optimizer,
        model_state_dict=cast("Any", model),
        optim_state_dict=cast("Any", state),
        options=OPTIONS,
    )
