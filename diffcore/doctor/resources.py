"""Memory, disk and time that a run will take, from what its first steps took."""

import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffcore.doctor.findings import Finding
from diffcore.io.network_size import machine_memory
from diffcore.sampling.generation import evaluation_mode
from diffcore.training.state import TrainState

if TYPE_CHECKING:
    from diffcore.doctor.training import Timing
    from diffcore.training.trainer import Trainer

__all__ = ["check_resources", "check_size"]

DISK_SPEED = 300e6
"""Bytes that are hashed and written in a second, an estimate."""
FULL = 0.9
"""Share of memory or disk above which a run is likely to fail."""


def check_size(settings: "Trainer") -> list[Finding]:
    """Estimate memory and disk from the network alone, before any step.

    Args:
        settings: settings of the run.

    Returns:
        The findings. The optimizer is taken to keep two numbers for each trained parameter, as Adam
        does.
    """
    network = settings.network()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return _size_findings(settings, network, 8 * trained, 0, machine_memory(), "the host")


def check_resources(settings: "Trainer", state: TrainState, timing: "Timing") -> list[Finding]:
    """Estimate memory, disk and time of the run.

    Args:
        settings: settings of the run.
        state: its state after some steps.
        timing: the time of these steps.

    Returns:
        One finding for each.
    """
    device = state.accelerator.device
    if device.type == "cuda":
        peak, available = timing.peak, torch.cuda.get_device_properties(device).total_memory
    else:
        peak, available = _process_peak(), machine_memory()
    optimizer = _optimizer_bytes(state.optimizer)
    further = further_sizes(state)
    findings = _size_findings(
        settings,
        state.trained,
        optimizer,
        peak,
        available,
        "the host" if device.type == "cpu" else str(device),
        further,
    )
    checkpoint = _checkpoint_bytes(settings, state.trained, optimizer) + further.checkpoint
    return [*findings, _duration(settings, state, timing, checkpoint)]


@dataclass(frozen=True)
class FurtherSizes:
    """Bytes of the networks of the objective beside that of the run.

    Args:
        teacher: weights of the frozen teacher.
        trained: weights, gradients and optimizers of the further networks.
        checkpoint: what a checkpoint holds of them: weights and optimizers.
    """

    teacher: int = 0
    trained: int = 0
    checkpoint: int = 0


def further_sizes(state: TrainState) -> FurtherSizes:
    """The memory of the networks of the objective, from their weights and optimizers.

    Args:
        state: state of the run after some steps.

    Returns:
        The sizes in bytes.
    """
    teacher = None if state.networks.teacher is None else state.networks.teacher.network
    tensors = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    checkpoint = trained = 0
    for name, network in state.further.items():
        module = state.networks.module(name)
        checkpoint += _bytes(module) + _optimizer_bytes(network.optimizer)
        trained += sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return FurtherSizes(sum(value.nbytes for value in tensors), trained + checkpoint, checkpoint)


def _process_peak() -> int:
    """Largest memory of this program so far in bytes; 0 if the system does not provide it."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def _checkpoint_bytes(settings: "Trainer", module: nn.Module, optimizer: int) -> int:
    """Bytes of a checkpoint: weights, their averages in float32, and the optimizer's state."""
    numbers = sum(value.numel() for value in module.state_dict().values())
    return _bytes(module) + optimizer + 4 * numbers * (1 + len(settings.snapshots.lengths))


def _size_findings(
    settings: "Trainer",
    module: nn.Module,
    optimizer: int,
    peak: int,
    available: int,
    device: str,
    further: FurtherSizes | None = None,
) -> list[Finding]:
    further = further or FurtherSizes()
    weights = _bytes(module)
    parameters = sum(p.numel() for p in module.parameters())
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    checkpoint = _checkpoint_bytes(settings, module, optimizer)
    averages = checkpoint - weights - optimizer
    needed = weights + gradients + optimizer + averages + further.teacher + further.trained
    values = {
        "parameters": parameters,
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "averages": averages,
        "peak": peak,
        "available": available,
    }
    if further.teacher or further.trained:
        values |= {"teacher": further.teacher, "further networks": further.trained}
    text = (
        f"{parameters:,} parameters: weights {_size(weights)}, gradients {_size(gradients)}, "
        f"optimizer {_size(optimizer)}, averages {_size(averages)}"
    )
    if further.teacher:
        text += f", teacher {_size(further.teacher)}"
    if further.trained:
        text += f", further networks with optimizers {_size(further.trained)}"
    if peak:
        text += f"; the measured peak with activations is {_size(peak)}"
    text += f" of {_size(available)} on {device}"
    if max(peak, needed) > FULL * available:
        memory = Finding(
            "memory",
            "wrong",
            f"{text}: set a smaller batch_size, more accumulation, or a smaller network.",
            values,
        )
    else:
        memory = Finding("memory", "ok", f"{text}.", values)
    return [memory, _disk(settings, checkpoint + further.checkpoint)]


def _disk(settings: "Trainer", checkpoint: int) -> Finding:
    """Space for the checkpoints that are kept and the one that is being written."""
    folder = Path(settings.folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = checkpoint * (settings.keep + 1)
    values = {"checkpoint": checkpoint, "needed": needed, "free": free}
    text = (
        f"a checkpoint takes {_size(checkpoint)}, and {settings.keep} kept and one that is being "
        f"written {_size(needed)} of {_size(free)} free in {folder}"
    )
    if needed > FULL * free:
        return Finding(
            "disk", "wrong", f"{text}: free space, or set a smaller keep or another folder.", values
        )
    return Finding("disk", "ok", f"{text}.", values)


def _duration(settings: "Trainer", state: TrainState, timing: "Timing", checkpoint: int) -> Finding:
    """The expected time of the run: steps, checkpoints and previews."""
    training = settings.steps * timing.step
    checkpoints = math.ceil(settings.steps / settings.save_every) * checkpoint / DISK_SPEED
    count = settings.steps // settings.sample_every if settings.sample_every else 0
    previews = count * _preview_seconds(settings, state) if count else 0.0
    total = training + checkpoints + previews
    values = {
        "step": timing.step,
        "training": training,
        "checkpoints": checkpoints,
        "previews": previews,
        "total": total,
    }
    return Finding(
        "time",
        "ok",
        f"{timing.step * 1000:,.0f} ms a step (median of {timing.steps}), so that {settings.steps} "
        f"steps take {_time(training)}; with about {_time(checkpoints)} of checkpoints and "
        f"{_time(previews)} of previews {_time(total)} on this machine.",
        values,
    )


@torch.no_grad()
def _preview_seconds(settings: "Trainer", state: TrainState) -> float:
    """Time of one preview: its steps times an evaluation of its samples, twice with guidance."""
    process, denoiser = settings.process, state.denoiser
    samples = len(settings.previews.samples(settings.source, process, settings.picture).seeds)
    x = torch.zeros(samples, *process.shape, device=state.accelerator.device)
    level = process.schedule.level(0.5)
    with evaluation_mode(denoiser):
        float(denoiser.output(x, level).sum())
        start = time.perf_counter()
        float(denoiser.output(x, level).sum())
        evaluation = time.perf_counter() - start
    return settings.sample_steps * evaluation * (2 if process.classes else 1)


def _size(count: int) -> str:
    """Bytes in a unit that people read."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
