"""The settings of a student: those of its teacher's training, changed as the method requires."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.cli.commands.distil.methods import (
    METHODS,
    REFLOW,
    Spec,
    check_teacher_process,
    find_method,
)
from diffcore.cli.image_model import is_pipeline
from diffcore.core.condition_values import GUIDANCE_SCALE, check_guidance_range
from diffcore.core.process import Process
from diffcore.io.specs import describe_spec, to_spec
from diffcore.run import Run

__all__ = ["DistillationRequest", "pipeline_settings", "report_student", "run_settings"]

KEPT = (
    "accumulation",
    "batch_size",
    "checkpoints",
    "clip",
    "compute",
    "data",
    "decay_only_matrices",
    "ema",
    "log_every",
    "network",
    "optimizer",
    "picture",
    "pin_memory",
    "pipeline",
    "precision",
    "prefetch",
    "previews",
    "process",
    "rank_timeout",
    "sample_every",
    "save_every",
    "seed",
    "sharding",
    "trackers",
    "workers",
)
"""Settings of the teacher's run that the student keeps."""
LCM_FEATURES = 256
"""Number of sinusoids of the scale of guidance in latent consistency models."""


@dataclass(frozen=True)
class DistillationRequest:
    """What `diffcore distil` is to train.

    Args:
        teacher: folder of a run or of a diffusers pipeline.
        method: name of the method.
        steps: number of sampling steps of the student.
        training_steps: number of optimizer steps, which the command passes on; 0: that of the
            method.
        scale: scale w of the teacher's guidance; None: that with which the run is sampled by
            default, or that of the recipe that fine-tunes the pipeline.
        guidance_range: smallest and largest w, which the student receives as an input; None: the
            teacher has one scale. `scale` is then the default w of samples.
        rounds: number of rounds of Reflow.
        folder: folder of the student.

    Raises:
        ValueError: the method or the folder of the teacher does not exist, or a number is out of
            range.
    """

    teacher: Path
    method: str
    steps: int = 4
    training_steps: int = 0
    scale: float | None = None
    guidance_range: tuple[float, float] | None = None
    rounds: int = 1
    folder: Path = Path("runs/student")

    def __post_init__(self) -> None:
        find_method(self.method)
        if not self.teacher.is_dir():
            raise ValueError(
                f"the teacher is {self.teacher}, which does not exist: name the folder of a run or "
                "of a diffusers pipeline"
            )
        if not (self.is_pipeline or Run(self.teacher).config.is_file()):
            raise ValueError(
                f"the teacher is {self.teacher}, which holds neither config.yaml of a run nor "
                "model_index.json of a diffusers pipeline: name the folder of either"
            )
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps is {self.steps}, expected 1 to 1000 sampling steps")
        if self.training_steps < 0:
            raise ValueError(
                f"training_steps is {self.training_steps}, expected at least 1 optimizer step"
            )
        if self.scale is not None and not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}, expected a finite w of at least 0")
        if self.rounds < 1 or (self.rounds > 1 and self.method != REFLOW):
            raise ValueError(
                f"rounds is {self.rounds}, expected 1, or more for the method {REFLOW}"
            )
        if self.guidance_range is not None:
            self._check_guidance_range(*self.guidance_range)

    def _check_guidance_range(self, low: float, high: float) -> None:
        if not find_method(self.method).accepts_guidance_range:
            names = [name for name, each in METHODS.items() if each.accepts_guidance_range]
            raise ValueError(
                f"guidance_range is {low:g},{high:g}, but a student of {self.method} has one "
                f"scale: use {', '.join(names)}, or --scale"
            )
        check_guidance_range(low, high)
        if self.scale is not None and not low <= self.scale <= high:
            raise ValueError(
                f"scale is {self.scale:g}, the default w of samples, expected within "
                f"guidance_range {low:g},{high:g}"
            )

    @property
    def is_pipeline(self) -> bool:
        """Whether the teacher is a diffusers pipeline."""
        return is_pipeline(self.teacher)


def run_settings(request: DistillationRequest) -> dict[str, Any]:
    """The settings of a student of a run.

    Args:
        request: what is trained.

    Returns:
        Settings as plain data, which options override.

    Raises:
        ValueError: the folder holds no run with weights, or the method cannot start from it.
    """
    run, method = Run(request.teacher), find_method(request.method)
    settings = run.settings()
    process = Process.load(run.process)
    check_teacher_process(request.method, process)
    guidance = settings.get("guidance") or {"class_path": "CFG"}
    if request.scale is not None:
        guidance = _scaled(request.scale)
    teacher: Spec = {
        "class_path": "RunTeacher",
        "init_args": {"folder": str(request.teacher), "guidance": guidance},
    }
    kept = {name: settings[name] for name in KEPT if name in settings}
    student = {
        "process": method.process(settings["process"]),
        "init": str(request.teacher),
    }
    if method.estimate == "mean_velocity":
        student["network"] = {
            "class_path": "diffcore.networks.TwoTimes",
            "init_args": {
                "network": settings["network"],
                "scale": method.interval / abs(process.time.scale),
            },
        }
    if request.method == REFLOW:
        student |= _reflow(request, teacher)
    else:
        student["objective"] = method.objective(
            request.method, teacher, request.steps, request.is_pipeline
        )
    settings = kept | student | _training(request) | _sampling(request)
    if request.guidance_range is None:
        return settings
    inner = settings["network"]
    settings["network"] = {
        "class_path": "diffcore.networks.GuidanceEmbedding",
        "init_args": {"network": inner},
    }
    return settings | _scaled_student(request, settings, guidance)


def pipeline_settings(request: DistillationRequest, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a student of a diffusers pipeline.

    Args:
        request: what is trained.
        recipe: settings of the recipe of the pipeline's family, which fine-tunes it.

    Returns:
        Settings as plain data, which options override.

    Raises:
        ValueError: the method has no student of this kind.
    """
    method = find_method(request.method)
    if not method.accepts_pipelines:
        raise ValueError(
            f"the method {request.method} has no student of a diffusers pipeline: use Consistency "
            "or DistributionMatching"
        )
    guidance = recipe["guidance"] if request.scale is None else _scaled(request.scale)
    teacher: Spec = {
        "class_path": "PipelineTeacher",
        "init_args": {"pipeline": str(request.teacher), "guidance": guidance},
    }
    student = {
        "pipeline": str(request.teacher),
        "process": method.process(dict(recipe.get("process") or {})),
        "objective": method.objective(request.method, teacher, request.steps, request.is_pipeline),
    }
    trained = _training(request) | {"lr": {"peak": 1e-5, "warmup": 100}}
    settings = dict(recipe) | student | trained | _sampling(request)
    if request.guidance_range is None:
        return settings
    network = settings["network"]
    options = dict(network.get("init_args") or {}) | {"guidance_embedding": LCM_FEATURES}
    settings["network"] = dict(network) | {"init_args": options}
    return settings | _scaled_student(request, settings, guidance)


def report_student(request: DistillationRequest, settings: Mapping[str, Any]) -> None:
    """Print on stderr what was chosen for a student; on the first rank only.

    Args:
        request: what is trained.
        settings: parsed settings of the training as plain data.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    lr, batch = settings["lr"]["peak"], settings["batch_size"]
    lines = {
        "teacher": str(request.teacher),
        "method": f"{request.method}: {find_method(request.method).summary}",
        "training": f"{settings['steps']} steps of {batch} samples at learning rate {lr:g}",
        "sampling": f"{settings['sample_steps']} steps of {_short(settings['sampler'])} on "
        f"{_short(settings['grid'])}",
    }
    print(
        *(f"diffcore: {name:<10} {text}" for name, text in lines.items()), sep="\n", file=sys.stderr
    )
    print("diffcore: --print_config prints all settings, and options change them", file=sys.stderr)


def _reflow(request: DistillationRequest, teacher: Spec) -> dict[str, Any]:
    """Pairs of the teacher's flow as the data, and the squared error of its velocity."""
    pairs = {"teacher": teacher, "folder": str(request.folder / "pairs")}
    weight = {"class_path": "MSE", "init_args": {"target": "flow_prediction"}}
    return {
        "data": {"class_path": "FlowPairs", "init_args": pairs},
        "objective": {"class_path": "Objective", "init_args": {"weight": weight}},
    }


def _scaled_student(
    request: DistillationRequest, settings: Mapping[str, Any], guidance: Any
) -> dict[str, Any]:
    """The process and the objective of a student whose input is the scale of guidance."""
    assert request.guidance_range is not None
    low, high = request.guidance_range
    usual = (guidance.get("init_args") or {}).get("scale")  # of any rule
    scale = usual if isinstance(usual, int | float) else (low + high) / 2
    record = {
        "shape": [1],
        "low": low,
        "high": high,
        "absent": "null",
        "null": [min(max(scale, low), high)],
    }
    process, objective = settings["process"], settings["objective"]
    conditions = dict(process.get("conditions") or {}) | {GUIDANCE_SCALE: record}
    teacher = objective["init_args"]["teacher"]
    unguided = teacher | {"init_args": teacher["init_args"] | {"guidance": _scaled(1.0)}}
    arguments = {"teacher": unguided, "guidance_range": [low, high]}
    return {
        "process": process | {"conditions": conditions},
        "objective": objective | {"init_args": objective["init_args"] | arguments},
    }


def _training(request: DistillationRequest) -> dict[str, Any]:
    return dict(find_method(request.method).settings) | {"folder": str(request.folder)}


def _sampling(request: DistillationRequest) -> dict[str, Any]:
    """How the student is sampled by default. Its teacher's guidance is a part of its weights."""
    method = find_method(request.method)
    return {
        "sampler": method.sampler,
        "grid": "Trailing" if request.is_pipeline else method.grid,
        "sample_steps": request.steps,
        "guidance": _scaled(1.0),
    }


def _scaled(scale: float) -> Spec:
    return {"class_path": "CFG", "init_args": {"scale": scale}}


def _short(spec: Any) -> str:
    """A component as a call, without the module of its class."""
    plain = to_spec(spec)
    if isinstance(plain, dict) and "class_path" in plain:
        plain = plain | {"class_path": plain["class_path"].rpartition(".")[2]}
    return describe_spec(plain)
