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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from diffcore.io.extras import EXTRAS, has_extra, missing

__all__ = [
    "DelayedMaximum",
    "GatheredState",
    "capture_state",
    "explain_lost_ranks",
    "make_accelerator",
    "restore_state",
    "run_on_first_rank",
    "wrap",
]

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
    precision: str,
    accumulation: int,
    trackers: Sequence[str],
    folder: str | Path,
    rank_timeout: int,
) -> Accelerator:
    """The accelerator of this rank, checked against the launcher.

    Args:
        precision: no, bf16 or fp16.
        accumulation: number of micro-batches of a rank in a step.
        trackers: names of accelerate's trackers.
        folder: folder of the run, in which trackers write.
        rank_timeout: number of seconds after which waiting for another rank is an error.

    Returns:
        The accelerator.

    Raises:
        ValueError: The device does not support the precision, a tracker is not installed, or the
            launcher, the environment and the settings contradict each other.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise ValueError("precision is fp16, which a CPU does not support: use bf16 or no")
    _check_environment(precision)
    _check_trackers(trackers)
    _forget_precision(precision)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=rank_timeout))],
    )
    _check_launcher(accelerator, accumulation)
    return accelerator


def _check_environment(precision: str) -> None:
    """Refuse what a launcher sets in the environment and the settings contradict."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", precision):
        raise ValueError(
            f"the launcher sets mixed precision {launched}, but precision is {precision}: train "
            f"with --precision {launched}, or launch without --mixed_precision"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise ValueError(
            f"the launcher sets the compiler {compiler}, which training does not use: launch "
            "without --dynamo_backend, or unset ACCELERATE_DYNAMO_BACKEND"
        )


def _check_trackers(trackers: Sequence[str]) -> None:
    for package in trackers:
        if package in EXTRAS and not has_extra(package):
            raise missing(package, f"The tracker {package} (--trackers=[] trains without one)")
    installed = sorted(LoggerType(name).value for name in get_available_trackers())
    if unknown := sorted({*trackers} - {*installed}):
        raise ValueError(
            f"trackers names {', '.join(unknown)}, which is unknown or not installed: expected "
            f"some of {', '.join(installed)}, or [] for none"
        )


def _forget_precision(precision: str) -> None:
    """Let this run have another precision than an earlier one in the same process."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()


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
    return GatheredState(_without_shared_memory(cast("NamedTensors", model)), flat, groups)


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


class DelayedMaximum:
    """The largest of a small number over all ranks, one call later; it never waits for the device.

    Each call starts a reduction on the hosts and returns the result of the call before, so that all
    ranks act on the same value at the same step.

    Args:
        accelerator: accelerator of this rank.
        rank_timeout: number of seconds after which waiting for another rank is an error.
    """

    def __init__(self, accelerator: Accelerator, rank_timeout: int) -> None:
        timeout = timedelta(seconds=rank_timeout)
        self.is_single = accelerator.num_processes == 1
        self.group = None if self.is_single else dist.new_group(backend="gloo", timeout=timeout)
        self.value = torch.zeros((), dtype=torch.int64)
        self.pending: Any = None

    def update(self, value: int) -> int:
        """Add this rank's number. Every rank must call it equally often.

        Args:
            value: number of this rank, at least 0.

        Returns:
            The maximum of the call before; on a single rank `value` itself.
        """
        if self.is_single:
            return value
        before = self.finish()
        self.value = torch.tensor(value)
        self.pending = dist.all_reduce(
            self.value, dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return before

    def finish(self) -> int:
        """Wait for the reduction that the last call started.

        Returns:
            Its maximum; 0 if there is none.
        """
        if self.pending is not None:
            self.pending.wait()
        self.pending = None
        return int(self.value)


def run_on_first_rank(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Run an action on the first rank while the others wait, however long it takes.

    Args:
        accelerator: accelerator of this rank. Every rank must call this function.
        action: called on the first rank.

    Raises:
        ValueError: The action failed on the first rank, which raises its own error.
    """
    if accelerator.num_processes == 1:
        action()
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as caught:
            error = caught
    reason = [f"{type(error).__name__}: {error}" if error else ""]
    dist.broadcast_object_list(reason, group=group)
    if error:
        raise error
    if reason[0]:
        raise ValueError(f"the first rank failed: {reason[0]}")


@contextmanager
def explain_lost_ranks(accelerator: Accelerator, rank_timeout: int) -> Iterator[None]:
    """Context in which a lost connection to another rank is an error that names the cause.

    Args:
        accelerator: accelerator of this rank.
        rank_timeout: number of seconds after which waiting for another rank is an error.

    Yields:
        Nothing.

    Raises:
        ValueError: Another rank ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        # torch raises a RuntimeError without a class of its own for gloo.
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise ValueError(
            f"rank {accelerator.process_index} of {accelerator.num_processes} lost another rank, "
            f"which ended (see its message) or did not answer for {rank_timeout} s "
            "(rank_timeout): continue with --resume true"
        ) from error
