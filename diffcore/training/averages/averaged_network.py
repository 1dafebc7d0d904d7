"""The network with its averaged weights as a second module, for losses that evaluate it.

The parameters of the module are the tensors of the average: it costs no memory beyond the average
itself, and each update of the average is one of the module. Frozen parameters are those of the
network of the run.
"""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from diffcore.training.ranks.sharding import shard

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["copy_network", "place_copy"]


def copy_network(settings: "Trainer", network: nn.Module) -> nn.Module | None:
    """Copy the network of a run, if its objective evaluates the averaged weights.

    Args:
        settings: settings of the run.
        network: network of the run with its initial weights, before `Compute` changes it.

    Returns:
        The copy, computed as the settings of the run say; None if the objective needs none.
    """
    if not settings.objective.needs_average:
        return None
    frozen = {id(value): value for value in network.parameters() if not value.requires_grad}
    copy = deepcopy(network, frozen)
    replace(settings.compute, checkpointing=False).apply(copy)  # it has no backward pass
    return copy


def place_copy(settings: "Trainer", accelerator: Accelerator, copy: nn.Module) -> nn.Module:
    """The copy on the device of this rank, in evaluation mode, sharded as the network is.

    Args:
        settings: settings of the run.
        accelerator: accelerator of this rank.
        copy: result of `copy_network`.

    Returns:
        The module, evaluated in the precision of the run.
    """
    mesh = settings.sharding.mesh(accelerator.num_processes, accelerator.device.type)
    if mesh is None:
        placed: nn.Module = accelerator.prepare_model(copy, evaluation_mode=True)
    else:  # gathered weights would stay those of an earlier step
        (placed,) = shard(accelerator, [copy], mesh, reshard=True)
    return placed.eval()
