"""Sharding of parameters, gradients, optimizer state and averages over ranks (FSDP2 of torch).

Each rank holds 1/n of every tensor. Before a block is evaluated its parameters are gathered, and
freed afterwards; gradients are averaged and scattered. The numbers are those of data parallelism to
rounding.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from diffcore.core.network import find_blocks
from diffcore.training.optimization.quantised_state import is_quantised
from diffcore.training.ranks.accelerator import wrap

__all__ = [
    "Sharding",
    "Strategy",
    "copy_whole",
    "gather_tensors",
    "local",
    "place",
    "set_gradient_reduction",
    "shard",
]

Strategy = Literal["none", "full", "hybrid"]


@dataclass(frozen=True)
class Sharding:
    """Which ranks share the parameters, gradients, optimizer state and averages of a run.

    A run on one rank has nothing to share, and ignores these settings. They change the rounding of
    a run only, so that it may change them, and its number of ranks, when it resumes.

    Args:
        strategy: none (every rank holds everything: data parallelism), full (FSDP2: every rank
            holds 1/ranks), or hybrid (HSDP: every rank holds 1/group, in ranks/group copies).
        group: number of ranks that share a copy under hybrid; 0 for those of one machine.
        reshard: true frees the gathered parameters of a block after its forward pass and gathers
            them again for the backward pass; false keeps them: faster, more memory.

    Raises:
        ValueError: `strategy` is not one of the three values, or `group` is negative or has no
            meaning.
    """

    strategy: Strategy = "none"
    group: int = 0
    reshard: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(
                f"sharding.strategy is {self.strategy!r}, expected one of "
                f"{', '.join(get_args(Strategy))}"
            )
        if self.group < 0 or (self.group and self.strategy != "hybrid"):
            raise ValueError(
                f"sharding.group is {self.group} with strategy {self.strategy}, expected the "
                "number of ranks that share a copy with strategy hybrid, else 0"
            )

    def mesh(self, ranks: int, device: str) -> DeviceMesh | None:
        """The arrangement of the ranks.

        Args:
            ranks: number of ranks.
            device: type of their devices.

        Returns:
            A mesh (ranks,), or (copies, group) under hybrid; None if nothing is sharded.

        Raises:
            ValueError: the ranks cannot be divided into groups.
        """
        if self.strategy == "none" or ranks == 1:
            return None
        if self.strategy == "full":
            return init_device_mesh(device, (ranks,))
        group = self.group or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if ranks % group or group == 1:
            raise ValueError(
                f"sharding.group is {group}, expected a divisor of the {ranks} ranks that is "
                "larger than 1"
            )
        names = ("copies", "group")
        return init_device_mesh(device, (ranks // group, group), mesh_dim_names=names)


def shard(
    accelerator: Accelerator, modules: Sequence[nn.Module], mesh: DeviceMesh, reshard: bool
) -> list[nn.Module]:
    """Modules on the device of this rank, sharded by block.

    Args:
        accelerator: accelerator of this rank.
        modules: modules that the optimizer will train; changed in place.
        mesh: arrangement of the ranks, see `Sharding.mesh`.
        reshard: true frees the gathered parameters of a block between its forward and backward
            pass.

    Returns:
        The modules, evaluated in the precision of the accelerator.
    """
    # For an evaluation accelerate moves the module and casts its inputs, and wraps nothing.
    placed = [accelerator.prepare_model(module, evaluation_mode=True) for module in modules]
    for module in placed:
        for block in (*find_blocks(module).values(), module):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return placed


def place(
    sharding: Sharding,
    accelerator: Accelerator,
    modules: Sequence[nn.Module],
    build: Callable[[Sequence[nn.Module]], Optimizer],
) -> tuple[list[nn.Module], Any]:
    """Modules and their optimizer as the ranks train them. An optimizer of shards holds shards.

    Args:
        sharding: ranks that share the parameters.
        accelerator: accelerator of this rank.
        modules: modules that the optimizer trains; changed in place if they are sharded.
        build: builds the optimizer of the modules.

    Returns:
        The modules, in order, and accelerate's optimizer.

    Raises:
        ValueError: the state of the optimizer cannot be sharded.
    """
    mesh = sharding.mesh(accelerator.num_processes, accelerator.device.type)
    if mesh is None:
        return wrap(accelerator, modules, build(modules))
    sharded = shard(accelerator, modules, mesh, sharding.reshard)
    optimizer = build(sharded)
    if is_quantised(optimizer):
        raise ValueError(
            f"sharding.strategy is {sharding.strategy}, but the quantised state of "
            f"{type(optimizer).__name__} cannot be sharded: use torch.optim.AdamW, or strategy none"
        )
    return sharded, accelerator.prepare_optimizer(optimizer)


def set_gradient_reduction(modules: Iterable[nn.Module], is_last: bool) -> None:
    """Reduce the gradients of sharded modules over the ranks only in the last micro-batch.

    Args:
        modules: modules, sharded or not; those that are not are left alone.
        is_last: whether the next backward pass is the last one of the step.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds.

    Args:
        tensor: any tensor, sharded or not.

    Returns:
        The part; it shares its memory with the tensor, and is the tensor itself if it is not
        sharded.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every rank passes, to one that may be sharded."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        whole = value.to(target.device, target.dtype)
        value = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


@torch.no_grad()
def gather_tensors(tensors: Mapping[str, Tensor], is_main_process: bool) -> dict[str, Tensor]:
    """Whole tensors on the first rank, one after the other. Every rank must call it.

    Args:
        tensors: tensors by name, each of them possibly sharded.
        is_main_process: whether this is the first rank.

    Returns:
        The tensors; sharded ones are whole and on the host of the first rank, and left out on the
        other ranks.
    """
    found = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            found[name] = value
            continue
        whole = value.full_tensor()
        if is_main_process:
            found[name] = whole.cpu()
    return found
