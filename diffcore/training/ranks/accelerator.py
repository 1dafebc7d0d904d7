"""The set-up of accelerate on a rank, checked against the launcher and the settings."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration
from torch import nn

from diffcore.io.extras import EXTRAS, has_extra, missing

__all__ = ["make_accelerator", "wrap"]


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
    # On a CPU accelerate ignores it without a word and trains by data parallelism.
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "the launcher selects DeepSpeed, which training does not use: launch without "
            "--use_deepspeed, or unset ACCELERATE_USE_DEEPSPEED; --sharding.strategy full (FSDP2) "
            "replaces ZeRO stage 3, and stages 1 and 2 with --sharding.reshard false"
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
            "parallelism (MULTI_GPU), and --sharding.strategy full to share the weights of the "
            "ranks"
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
