"""Ranks, precision and sharding: the set-up of accelerate, and the state of a distributed network.

Data parallelism (DDP) is supported. FSDP or another sharded strategy is added here:

- `make_accelerator` refuses every other strategy; admit it in `_check_launcher`.
- `wrap` passes the modules through accelerate, which shards them.
- `capture_state` and `restore_state` use torch.distributed.checkpoint, which gathers and scatters
  sharded tensors.
- The average of the weights (`ema.EMA`) is elementwise, so that each rank averages its shard.
  Checkpoints, previews and pipelines read `EMA.shadow` on the first rank only; gather it before.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from diffcore.io.extras import EXTRAS, has_extra, missing

__all__ = ["GatheredState", "capture_state", "make_accelerator", "restore_state", "wrap"]

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


def make_accelerator(
    precision: str, accumulation: int, trackers: Sequence[str], folder: str | Path
) -> Accelerator:
    """The accelerator of this rank, checked against the launcher.

    Args:
        precision: no, bf16 or fp16.
        accumulation: number of micro-batches of a rank in a step.
        trackers: names of accelerate's trackers.
        folder: folder of the run, in which trackers write.

    Returns:
        The accelerator.

    Raises:
        ValueError: The device does not support the precision, a tracker is not installed, or the
            launcher, the environment and the settings contradict each other.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise ValueError("precision is fp16, which a CPU does not support: use bf16 or no")
    for package in trackers:
        if package in EXTRAS and not has_extra(package):
            raise missing(package, f"The tracker {package} (--trackers=[] trains without one)")
    installed = sorted(LoggerType(name).value for name in get_available_trackers())
    if unknown := sorted({*trackers} - {*installed}):
        raise ValueError(
            f"trackers names {', '.join(unknown)}, which is unknown or not installed: expected "
            f"some of {', '.join(installed)}, or [] for none"
        )
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
    )
    _check_launcher(accelerator, accumulation)
    return accelerator


def _check_launcher(accelerator: Accelerator, accumulation: int) -> None:
    launched = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes != int(launched):
        raise ValueError(
            f"the launcher started {launched} ranks, but accelerate sees "
            f"{accelerator.num_processes}: on a CPU launch with ACCELERATE_USE_CPU=true and "
            "--multi_gpu"
        )
    if accelerator.gradient_accumulation_steps != accumulation:
        raise ValueError(
            "the environment sets ACCELERATE_GRADIENT_ACCUMULATION_STEPS: unset it, and use "
            "--accumulation"
        )
    strategy = accelerator.distributed_type.value
    if strategy != "NO" and not strategy.startswith("MULTI"):
        raise ValueError(
            f"accelerate is configured for {strategy}, which is not supported: use data "
            "parallelism (MULTI_GPU)"
        )


def wrap(
    accelerator: Accelerator, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[list[nn.Module], Any]:
    """Modules and optimizer on the device of this rank, wrapped for its ranks.

    Args:
        accelerator: accelerator of this rank.
        modules: modules that the optimizer trains.
        optimizer: optimizer of their parameters.

    Returns:
        The wrapped modules, in order, and accelerate's wrapped optimizer.
    """
    *wrapped, wrapped_optimizer = accelerator.prepare(*modules, optimizer)
    return wrapped, wrapped_optimizer


def capture_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> GatheredState:
    """Gather the whole state of a network and its optimizer. Every rank must call it.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.

    Returns:
        The state on the host of the first rank; the other ranks receive nothing.
    """
    model, state = get_state_dict(network, optimizer, options=FULL_ON_HOST)
    # Ranks other than the first receive nothing.
    by_parameter = cast("dict[str, NamedTensors]", state.get("state", {}))
    flat = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, values in by_parameter.items()
        for key, value in values.items()
    }
    groups = cast("list[dict[str, Any]]", state.get("param_groups", []))
    return GatheredState(cast("NamedTensors", model), flat, groups)


def restore_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: GatheredState
) -> None:
    """Restore the state of a network and its optimizer. Every rank must call it.

    Args:
        network: network, possibly sharded.
        optimizer: optimizer of its parameters.
        state: whole state, as `capture_state` returned it on the first rank; every rank passes it.
    """
    if not state.optimizer:  # SGD without momentum has no tensors, which torch does not expect
        set_model_state_dict(network, cast("Any", state.network), options=FULL_ON_HOST)
        return
    by_parameter: dict[str, Any] = {}
    for name, value in state.optimizer.items():
        parameter, key = name.rsplit(".", 1)
        by_parameter.setdefault(parameter, {})[key] = value
    set_state_dict(
        network,
        optimizer,
        model_state_dict=cast("Any", state.network),
        optim_state_dict=cast("Any", {"state": by_parameter, "param_groups": state.groups}),
        options=FULL_ON_HOST,
    )
