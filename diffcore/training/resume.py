"""How a run starts and resumes: what a checkpoint contains, how it is loaded, and what is refused.

A run resumes from its newest complete checkpoint as if it had not stopped. Resuming is refused if
the process, the data, the frozen weights, or a setting that affects the weights has changed.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import yaml

from diffcore.core.process import Process
from diffcore.io.files import write_file
from diffcore.io.plain_data import read_yaml
from diffcore.training import checkpoint
from diffcore.training.checkpoint import Checkpoint
from diffcore.training.distributed import GatheredState, capture_state, restore_state
from diffcore.training.ema import EMA
from diffcore.training.reporting import Metrics
from diffcore.training.state import TrainState

if TYPE_CHECKING:
    from diffcore.run import Run

__all__ = ["check_settings", "checkpoint_of", "start_or_resume"]

CHANGEABLE = {
    "accumulation",
    "folder",
    "grid",
    "guidance",
    "keep",
    "log_every",
    "patience",
    "resume",
    "sample_every",
    "sample_steps",
    "sampler",
    "save_every",
    "steps",
    "trackers",
    "validation",
    "workers",
}
"""Settings that may change on resume.

They do not enter the weights, except `steps`, which enters only the learning rate.
"""


def start_or_resume(state: TrainState, message: Callable[[str], None]) -> None:
    """Start the folder of the run, or load its newest complete checkpoint if `resume` is set.

    Args:
        state: state at step 0; changed in place.
        message: prints a line to the user.

    Raises:
        ValueError: The folder holds a run and `resume` is not set; or it holds none, another one,
            or no whole checkpoint, and `resume` is set.
    """
    settings, run = state.settings, state.settings.run
    if settings.resume:
        _resume(state, message)
    elif run.config.exists():
        raise ValueError(
            f"{run.folder} holds a run already: continue it with --resume true, or choose another "
            "folder"
        )
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.set_aside(run.checkpoints, state.step)
        settings.process.save(run.process)
        if settings.config or not run.config.exists():
            write_file(run.config, settings.config.encode())
        Metrics(run.metrics).rewind(state.step)
        Metrics(run.validation).rewind(state.step)
    state.accelerator.wait_for_everyone()


def checkpoint_of(state: TrainState) -> Checkpoint:
    """Gather everything that a resumed run needs. Every rank must call it.

    Returns:
        The content of a checkpoint; it is whole only on the first rank.
    """
    window, levels = state.window.gathered(), state.level_sampler.tensors()
    captured = capture_state(state.trained, state.optimizer.optimizer)
    return Checkpoint(
        {
            "model.safetensors": captured.network,
            **{name: average.shadow for name, average in _averages(state).items()},
            "training.safetensors": {**captured.optimizer, **levels, "window": window},
        },
        {
            "step": state.step,
            "skipped": state.non_finite_steps,
            "held_out": state.held_out_losses,
            "groups": captured.groups,
            **_rounding(state),
            **state.content_hashes,
        },
    )


def check_settings(run: "Run", config: str, process: Process) -> None:
    """Raise ValueError if a run was started with other settings or another process.

    Args:
        run: folder of the run.
        config: YAML of the present settings; "" if they are not known.
        process: present process.
    """
    if not run.config.exists():
        raise ValueError(
            f"{run.folder} holds no run to resume: leave out --resume, or choose another folder"
        )
    if config:
        then, now = read_yaml(run.config), yaml.safe_load(config)
        names = {*then, *now} - CHANGEABLE
        _refuse(run, sorted(name for name in names if then.get(name) != now.get(name)))
    before = Process.load(run.process)
    changed = [
        field.name
        for field in fields(Process)
        if getattr(before, field.name) != getattr(process, field.name)
    ]
    hints = {"classes": "process.classes (the captions of the data?)"}
    _refuse(run, [hints.get(name, f"process.{name}") for name in changed])


def _resume(state: TrainState, message: Callable[[str], None]) -> None:
    """Load the newest complete checkpoint; a run that stopped before its first one starts again."""
    settings, run = state.settings, state.settings.run
    check_settings(run, settings.config, settings.process)
    newest = checkpoint.newest(run.checkpoints, message)
    if newest is None and any(run.checkpoints.glob("step-*")):
        raise ValueError(
            f"{run.checkpoints} has no whole checkpoint left: start a new run in another folder"
        )
    if newest is None:
        message("no checkpoint yet: starting at step 0")
        return
    _check_checkpoint(state, newest.state, message)
    _load(state, newest)
    message(f"resumed at step {state.step}")


def _load(state: TrainState, saved: Checkpoint) -> None:
    """Restore everything that `checkpoint_of` stored."""
    optimizer = saved.tensors["training.safetensors"]
    state.window.restore(optimizer.pop("window"))
    state.level_sampler.restore(optimizer)
    network = saved.tensors["model.safetensors"]
    gathered = GatheredState(network, optimizer, saved.state["groups"])
    restore_state(state.trained, state.optimizer.optimizer, gathered)
    for name, average in _averages(state).items():
        average.load(saved.tensors[name])
    state.step, state.non_finite_steps = saved.state["step"], saved.state["skipped"]
    state.held_out_losses = list(saved.state["held_out"])


def _averages(state: TrainState) -> dict[str, EMA]:
    """All averages by the name of their file in a checkpoint."""
    further = state.further_averages.items()
    names = {f"ema-{length:.4f}.safetensors": average for length, average in further}
    return {"ema.safetensors": state.average, **names}


def _check_checkpoint(
    state: TrainState, saved: dict[str, Any], message: Callable[[str], None]
) -> None:
    """Refuse a checkpoint beyond the last step or of other data; announce another rounding."""
    settings = state.settings
    if saved["step"] > settings.steps:
        raise ValueError(
            f"steps is {settings.steps}, but the run has taken {saved['step']}: set steps to at "
            "least as many"
        )
    changed = [name for name, now in state.content_hashes.items() if saved.get(name, now) != now]
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} are not those with which the run in "
            f"{settings.run.folder} was started: images, captions, their encoders, or the weights "
            "under an adapter changed since; restore them, or start a new run in another folder"
        )
    rounding = _rounding(state).items()
    if other := {name: (saved[name], now) for name, now in rounding if saved[name] != now}:
        message(
            f"(then, now) differ in {other}: the run continues equal to rounding, not bit for bit"
        )


def _refuse(run: "Run", changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"the run in {run.folder} was started with another {', '.join(changed)}: resume it "
            f"with --config {run.config}, or start a new run in another folder"
        )


def _rounding(state: TrainState) -> dict[str, int]:
    """What the last bits of a run depend on."""
    return {"processes": state.accelerator.num_processes, "threads": torch.get_num_threads()}
