"""How this process trains: accelerate, as the launcher and our settings say, where the two agree."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from diffcore.io.extras import EXTRAS, has_extra, missing


def accelerator(
    precision: str, accumulation: int, trackers: list[str], folder: Path
) -> Accelerator:
    """Accelerate for this process, where the launcher's processes and accelerate's are the same."""
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise ValueError("precision is fp16, which a CPU does not do: use bf16 or no")
    for package in trackers:
        if package in EXTRAS and not has_extra(package):
            raise missing(package, f"The tracker {package} (--trackers=[] trains without one)")
    made = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        log_with=trackers or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
    )
    if made.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but accelerate sees "
            f"{made.num_processes}: on a CPU launch with ACCELERATE_USE_CPU=true and --multi_gpu"
        )
    if made.gradient_accumulation_steps != accumulation:
        raise ValueError(
            "the environment sets ACCELERATE_GRADIENT_ACCUMULATION_STEPS: unset it, and use --accumulation"
        )
    kind = made.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI"):
        raise ValueError(
            f"accelerate is set up for {kind}, which this trainer does not do: use data parallel (MULTI_GPU)"
        )
    return made
