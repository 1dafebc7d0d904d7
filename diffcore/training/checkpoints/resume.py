"""How a run starts and resumes: what a checkpoint contains, how it is loaded, and what is refused.

A run resumes from its newest complete checkpoint as if it had not stopped. Resuming is refused if
the process, the data, the frozen weights, or a setting that affects the weights has changed. The
checkpoint holds these settings, so that a changed config.yaml is detected.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from diffcore.core.process import OPTIONAL
from diffcore.io.files import check_links, remove_leftovers, write_file
from diffcore.io.manifest import NAME, checkpoint_folders, empty_tensors, load_shards
from diffcore.io.plain_data import without_defaults
from diffcore.io.specs import to_spec
from diffcore.objectives.objective import Objective
from diffcore.run import AVERAGED, FILES, RAW, without_locations
from diffcore.training.averages.ema import EMA
from diffcore.training.checkpoints import checkpoint, outputs
from diffcore.training.checkpoints.checkpoint import Checkpoint
from diffcore.training.checkpoints.initial_weights import load_initial_weights
from diffcore.training.checkpoints.sharded import flatten_parts
from diffcore.training.ranks.captured_state import (
    IMPLEMENTATION,
    CapturedState,
    capture_state,
    restore_state,
)
from diffcore.training.ranks.sharding import gather_tensors
from diffcore.training.reports.metrics import Metrics
from diffcore.training.state import TrainState

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["checkpoint_of", "determining_settings", "start_or_resume"]

AVERAGE = FILES[AVERAGED]
"""File of a checkpoint with the averaged weights."""
TRAINING = "training.safetensors"
"""File of a checkpoint with the state of the optimizer, and the losses since the last report."""
WINDOW = "window"
NETWORKS = "networks"
"""Entry of a checkpoint's state with the optimizer's groups of each further network."""
CHANGEABLE = {
    "accumulation",
    "checkpoints",
    "compute",
    "folder",
    "grid",
    "guidance",
    "keep",
    "log_every",
    "patience",
    "picture",
    "pin_memory",
    "prefetch",
    "previews",
    "rank_timeout",
    "resume",
    "sample_every",
    "sample_steps",
    "sampler",
    "save_every",
    "sharding",
    "steps",
    "trackers",
    "tracking",
    "validation",
    "workers",
}
"""Settings that may change on resume.

They do not enter the weights, except `steps`, which enters only the learning rate, and `compute`,
which enters only the rounding.
"""
FACTORIES = ("network", "data", "optimizer")
"""Settings that are plain data in config.yaml only."""
HINTS = {"process.classes": ", the captions of the data?"}


def start_or_resume(state: TrainState, message: Callable[[str], None]) -> None:
    """Start the folder of the run, or load its newest complete checkpoint, as `resume` demands.

    Args:
        state: state at step 0; changed in place.
        message: prints a line to the user.

    Raises:
        ValueError: The folder holds a run and `resume` is false; or it holds none and `resume` is
            true; or its run cannot be continued with these settings.
    """
    check_links(state.settings.run.folder)
    if _is_resumed(state.settings, message):
        _resume(state, message)
    if not state.step and state.settings.init:
        load_initial_weights(state, message)
    averaged = state.gathered_average() if state.step and state.has_outputs else {}
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        _prepare_folder(state, averaged, message)
    state.accelerator.wait_for_everyone()


def _is_resumed(settings: "Trainer", message: Callable[[str], None]) -> bool:
    """Whether the folder holds a run that is to be continued; other runs are not touched."""
    run = settings.run
    outcome = [*checkpoint_folders(run.checkpoints), run.weights, run.pipeline]
    left = [path for path in outcome if path.exists()]
    if left and not settings.resume:
        raise ValueError(
            f"{run.folder} holds a run already ({left[-1].relative_to(run.folder)}): continue it "
            "with --resume true, or choose another folder"
        )
    if not left and not run.config.exists() and settings.resume is True:
        raise ValueError(
            f"{run.folder} holds no run to resume: begin it with --resume auto, or name the folder "
            "of the run with --folder"
        )
    if not left and run.config.exists():
        message(f"{run.folder} holds a run without a checkpoint: starting at step 0")
    return bool(left)


def _resume(state: TrainState, message: Callable[[str], None]) -> None:
    """Load the newest complete checkpoint."""
    run = state.settings.run
    newest = checkpoint.newest(run.checkpoints, message, state.accelerator)
    if newest is None:
        weights = f", from its weights: --init {run.folder}" if run.weights.exists() else ""
        raise ValueError(
            f"{run.checkpoints} has no whole checkpoint left: start a new run in another "
            f"folder{weights}"
        )
    try:
        _check_checkpoint(state, newest.state, message)
        _load(state, newest)
    except (KeyError, IndexError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"the newest checkpoint in {run.checkpoints} has not the content of one of this run "
            f"({type(error).__name__}: {error}): start a new run in another folder"
        ) from None
    message(f"resumed at step {state.step}")


def _prepare_folder(
    state: TrainState, averaged: dict[str, Tensor], message: Callable[[str], None]
) -> None:
    """Make the files of the run agree with its state, which a checkpoint or a start has defined."""
    settings, run = state.settings, state.settings.run
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    reports = (run.metrics, run.speed, run.validation, run.non_finite)
    files = [path.name for path in (run.config, run.process, run.weights, run.wandb, *reports)]
    remove_leftovers(run.folder, *map(re.escape, (*files, *outputs.exported_names(state))))
    remove_leftovers(run.checkpoints, NAME, re.escape(outputs.RECORD))
    checkpoint.set_aside(run.checkpoints, state.step)
    settings.process.save(run.process)
    if settings.config or not run.config.exists():
        write_file(run.config, settings.config.encode())
    for path in reports:
        for line in Metrics(path).rewind(state.step):
            message(f"{path}: line {line} is no report, and is left out")
    if state.step and state.has_outputs:
        outputs.update(state, averaged, message)


def checkpoint_of(state: TrainState, is_gathered: bool = True) -> Checkpoint:
    """Collect everything that a resumed run needs. Every rank must call it.

    Args:
        state: state of the run.
        is_gathered: true gathers whole tensors on the first rank; false returns the tensors of this
            rank themselves, which training changes.

    Returns:
        The content of a checkpoint; if it is gathered, it is whole only on the first rank.
    """
    window, levels = state.window.gathered(), state.level_sampler.tensors()
    is_first = state.accelerator.is_main_process
    gather = partial(gather_tensors, is_main_process=is_first) if is_gathered else dict
    captured = capture_state(state.trained, state.optimizer.optimizer, is_gathered)
    scaler = state.accelerator.scaler  # of fp16
    further = {name: _capture_further(state, name, is_gathered) for name in state.further}
    groups = {NETWORKS: {name: each.groups for name, each in further.items()}} if further else {}
    return Checkpoint(
        {
            FILES[RAW]: captured.network,
            **{name: gather(average.shadow) for name, average in _averages(state).items()},
            TRAINING: {**captured.optimizer, **levels, WINDOW: window},
            **_further_files(further),
        },
        {
            "step": state.step,
            "skipped": state.non_finite_steps,
            "held_out": list(state.held_out_losses),  # which grows while it is written
            "groups": captured.groups,
            "gradient_scaler": scaler.state_dict() if scaler else {},
            **groups,
            **_rounding(state),
            "settings": determining_settings(state.settings),
            **state.content_hashes,
        },
    )


def _capture_further(state: TrainState, name: str, is_gathered: bool) -> CapturedState:
    """The state of a further network and its optimizer. Every rank must call it."""
    optimizer = state.further[name].optimizer.optimizer
    return capture_state(state.networks.module(name), optimizer, is_gathered)


def _further_files(captured: dict[str, CapturedState]) -> dict[str, dict[str, Tensor]]:
    """The files of a checkpoint with the weights and the optimizers of further networks."""
    weights = {f"{name}.safetensors": each.network for name, each in captured.items()}
    optimizers = {f"{name}-training.safetensors": each.optimizer for name, each in captured.items()}
    return weights | optimizers


def determining_settings(settings: "Trainer") -> dict[str, Any]:
    """The settings that determine the weights of a run.

    Args:
        settings: settings of the run.

    Returns:
        The settings as plain data of JSON; network, data and optimizer only if config.yaml defines
        them. Folders whose content is hashed are left out.
    """
    config = yaml.safe_load(settings.config) or {}
    left_out = {*CHANGEABLE, *FACTORIES, "config"}
    names = [field.name for field in fields(settings) if field.name not in left_out]
    values = {name: without_locations(to_spec(getattr(settings, name))) for name in names}
    if type(settings.objective) is Objective:  # as checkpoints had it before there were others
        values["objective"] = values["objective"]["init_args"]
    values["snapshots"] = {"lengths": values["snapshots"]["lengths"]}  # `every` may change
    values |= {name: without_locations(config[name]) for name in FACTORIES if name in config}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=lambda value: repr(type(value))))
    return plain


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as versions without the optional fields of a process would store them, and without
    the implementation of the optimizer, which enters only the rounding.
    """
    found = {**settings, "process": without_defaults(settings["process"], OPTIONAL)}
    if isinstance(optimizer := settings.get("optimizer"), dict):
        options = optimizer.get("init_args", {}).items()
        kept = {name: value for name, value in options if name not in IMPLEMENTATION}
        found["optimizer"] = {**optimizer, "init_args": kept}
    if isinstance(objective := settings.get("objective"), dict) and "init_args" in objective:
        options = {"target": "own"} | objective["init_args"]  # before there were averaged targets
        found["objective"] = {**objective, "init_args": options}
    return found


def _changes(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Describe the entries in which two settings differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _changes(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name} ({then}, now {now}{HINTS.get(name, '')})"


def _load(state: TrainState, saved: Checkpoint) -> None:
    """Restore everything that `checkpoint_of` stored."""
    if saved.shards:
        _load_shards(state, saved.shards, saved.state)
    else:
        _load_gathered(state, saved)
    if state.accelerator.scaler and (scaler := saved.state["gradient_scaler"]):
        state.accelerator.scaler.load_state_dict(scaler)
    if "init" in saved.state:
        state.content_hashes["init"] = saved.state["init"]
    state.step, state.non_finite_steps = saved.state["step"], saved.state["skipped"]
    state.checked = state.step
    state.held_out_losses = list(saved.state["held_out"])


def _load_gathered(state: TrainState, saved: Checkpoint) -> None:
    optimizer = saved.tensors[TRAINING]
    state.window.restore(optimizer.pop(WINDOW))
    state.level_sampler.restore(optimizer)
    captured = CapturedState(saved.tensors[FILES[RAW]], optimizer, saved.state["groups"])
    restore_state(state.trained, state.optimizer.optimizer, captured)
    for name, network in state.further.items():
        captured = CapturedState(
            saved.tensors[f"{name}.safetensors"],
            saved.tensors[f"{name}-training.safetensors"],
            saved.state[NETWORKS][name],
        )
        restore_state(state.networks.module(name), network.optimizer.optimizer, captured)
    for name, average in _averages(state).items():
        average.load(saved.tensors[name])


def _load_shards(state: TrainState, folder: str | Path, saved: dict[str, Any]) -> None:
    """Read the shards of this rank into its tensors."""
    captured = capture_state(state.trained, state.optimizer.optimizer, is_gathered=False)
    networks = {name: _capture_further(state, name, is_gathered=False) for name in state.further}
    own = flatten_parts(
        {
            FILES[RAW]: captured.network,
            TRAINING: captured.optimizer,
            **{name: average.shadow for name, average in _averages(state).items()},
            **_further_files(networks),
        }
    )
    # Of changing shape: the losses since the last report, and those of the level sampler.
    stored = empty_tensors(folder, "")
    changing = {name: value for name, value in stored.items() if name not in own}
    load_shards(folder, {**own, **changing}, is_single=state.accelerator.num_processes == 1)
    prefix = f"{Path(TRAINING).stem}/"
    levels = {name.removeprefix(prefix): value for name, value in changing.items()}
    state.window.restore(levels.pop(WINDOW))
    state.level_sampler.restore(levels)
    if levels:
        raise KeyError(next(iter(levels)))
    captured = captured._replace(groups=saved["groups"])
    restore_state(state.trained, state.optimizer.optimizer, captured, is_gathered=False)
    for name, each in networks.items():
        own_optimizer = state.further[name].optimizer.optimizer
        restored = each._replace(groups=saved[NETWORKS][name])
        restore_state(state.networks.module(name), own_optimizer, restored, is_gathered=False)


def _averages(state: TrainState) -> dict[str, EMA]:
    """All averages by the name of their file in a checkpoint."""
    further = state.further_averages.items()
    names = {f"ema-{length:.4f}.safetensors": average for length, average in further}
    return {AVERAGE: state.average, **names}


def _check_checkpoint(
    state: TrainState, saved: dict[str, Any], message: Callable[[str], None]
) -> None:
    """Refuse other settings, other data or a checkpoint beyond the end; announce other rounding."""
    settings, run = state.settings, state.settings.run
    anew = f"start a new run from its weights with --init {run.folder} and another --folder"
    then, now = saved["settings"], determining_settings(settings)
    if _has_moved(then.get("init")):
        now = {**now, "init": then["init"]}
    if changes := list(_changes(_comparable(then), _comparable(now))):
        raise ValueError(
            f"the run in {run.folder} was started with another {', '.join(changes)}: set the first "
            f"value, or {anew}"
        )
    if saved["step"] > settings.steps:
        raise ValueError(
            f"steps is {settings.steps}, but the run has taken {saved['step']}: set steps to at "
            "least as many"
        )
    changed = [name for name, now in state.content_hashes.items() if saved.get(name, now) != now]
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} are not those with which the run in "
            f"{run.folder} was started: images, captions, their encoders, or the weights "
            f"under an adapter changed since; restore them, or {anew}"
        )
    rounding = _rounding(state).items()
    saved = saved | {"fused": _is_fused(saved["groups"])}
    if other := {
        name: (saved.get(name), now) for name, now in rounding if saved.get(name, now) != now
    }:
        message(
            f"(then, now) differ in {other}: the run continues equal to rounding, not bit for bit"
        )


def _has_moved(init: Any) -> bool:
    """Whether the folder of the initial weights is gone; the weights now are the checkpoint's."""
    return isinstance(init, str) and not Path(init).exists()


def _rounding(state: TrainState) -> dict[str, Any]:
    """What the last bits of a run depend on."""
    return {
        "processes": state.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "compute": asdict(state.settings.compute),
        "fused": _is_fused(state.optimizer.param_groups),
    }


def _is_fused(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the kernels of torch's fused optimizers update the parameters."""
    return all(group.get("fused") for group in groups)
