"""The command `diffcore distil`: it reads its options and trains the student."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from diffcore.cli.arguments import extract_option, wants_help
from diffcore.cli.commands.distil.methods import METHODS, REFLOW, find_method
from diffcore.cli.commands.distil.student import (
    DistillationRequest,
    pipeline_settings,
    report_student,
    run_settings,
)
from diffcore.cli.training.family_recipe import choose_recipe
from diffcore.cli.training.recipes import find_settings, read_settings
from diffcore.cli.training.training_settings import build_trainer, parse_content, training_parser
from diffcore.io.files import write_file
from diffcore.io.parser import ComponentParser
from diffcore.sampling.loop import check_guidance, check_levels
from diffcore.training.data.scan import shared_scans
from diffcore.training.trainer import Trainer

__all__ = ["main"]

OPTIONS = {
    "method": f"the name of a method: {', '.join(METHODS)}",
    "steps": "the number of sampling steps of the student",
    "training_steps": "the number of optimizer steps",
    "scale": "the scale w of the teacher's guidance",
    "guidance_range": "the smallest and the largest scale w, such as 1,8",
    "rounds": "the number of rounds of Reflow",
    "folder": "the folder of the student",
}
"""Options of the command that are no settings of the training, and what each expects."""
TRAJECTORIES = 256
"""Number of trajectories of which the straightness is the mean."""


def main(argv: Sequence[str]) -> None:
    """Distil the run or the pipeline that the first word names.

    Args:
        argv: command-line words after `distil`.

    Raises:
        ValueError: the teacher is missing, or an option is out of range.
    """
    parser = training_parser(
        "diffcore distil",
        "Train a generator of few steps from a teacher: the run or the diffusers pipeline in a "
        f"folder. --method is one of {', '.join(METHODS)}; --steps is the number of sampling steps "
        "of the student, --training_steps that of its training, --scale the guidance of the "
        "teacher, and --rounds the rounds of Reflow. --guidance_range 1,8 makes the scale w an "
        "input of the student, --condition.guidance_scale of `diffcore sample`. All options of "
        "`diffcore train` override the settings that the teacher and the method determine.",
        "diffcore distil RUN | PIPELINE --method METHOD [--steps 4] [--option value ...]",
    )
    if wants_help(argv):
        parser.parse_args(argv)
    request, words = _read_request(argv)
    if request.rounds > 1 and any(word.startswith("--print_config") for word in words):
        raise ValueError(
            f"rounds is {request.rounds}, and --print_config prints the settings of one training: "
            "leave --rounds out; the teacher of each further round is the student before it"
        )
    for number in range(1, request.rounds):
        folder = request.folder / "rounds" / str(number)
        _train(parser, replace(request, folder=folder, rounds=1), [*words, "--resume=auto"])
        request = replace(request, teacher=folder, scale=None)  # which its weights contain
    _train(parser, request, words)


def _read_request(argv: Sequence[str]) -> tuple[DistillationRequest, list[str]]:
    """What is trained, and the options of the training."""
    words: list[str] = list(argv)
    given: dict[str, str] = {}
    if not words or words[0].startswith("-"):
        raise ValueError(
            "the teacher comes first, the folder of a run or of a diffusers pipeline: "
            "diffcore distil RUN --method METHOD"
        )
    teacher = Path(words.pop(0))
    for name, expected in OPTIONS.items():
        values, words = extract_option(words, name, expected)
        if values:
            given[name] = values[-1]
    options: dict[str, Any] = {
        name: _number(name, given[name], kind)
        for name, kind in (
            ("steps", int),
            ("training_steps", int),
            ("rounds", int),
            ("scale", float),
            ("guidance_range", _range),
        )
        if name in given
    }
    if options.get("training_steps") == 0:
        raise ValueError("training_steps is 0, expected at least 1 optimizer step")
    if "training_steps" in options:  # which --lora would change otherwise
        words.append(f"--steps={options['training_steps']}")
    if "folder" in given:
        options["folder"] = Path(given["folder"])
    return DistillationRequest(teacher, given.get("method", ""), **options), words


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "an integer" if kind is int else "a number" if kind is float else OPTIONS[name]
        raise ValueError(f"{name} is {text!r}, expected {what}") from None


def _range(text: str) -> tuple[float, float]:
    """Two numbers such as 1,8."""
    low, high = text.strip("[]()").split(",")
    return float(low), float(high)


def _train(parser: ComponentParser, request: DistillationRequest, words: list[str]) -> None:
    """Train one student."""
    with shared_scans():
        settings = _parse(parser, request, words)
        _check_teacher(request, settings)
        report_student(request, settings.as_dict())
        trainer = build_trainer(parser, settings)
        _check_sampling(trainer)
    state = trainer.train()
    if request.method == REFLOW and state.accelerator.is_main_process:
        _report_straightness(trainer)


def _parse(parser: ComponentParser, request: DistillationRequest, words: list[str]) -> Namespace:
    if not request.is_pipeline:
        return parse_content(parser, run_settings(request), words, str(request.teacher))
    recipe = choose_recipe([f"--pipeline={request.teacher}"])
    content = pipeline_settings(request, read_settings(find_settings(recipe)))
    return parse_content(parser, content, words, recipe)


def _check_teacher(request: DistillationRequest, settings: Namespace) -> None:
    """Raise ValueError if an option has replaced the objective by one without a teacher."""
    objective = settings.as_dict()["objective"]
    if find_method(request.method).has_teacher and not objective["init_args"].get("teacher"):
        name = objective["class_path"].rpartition(".")[2]
        kind, option = "RunTeacher", "--objective.teacher.folder"
        if request.is_pipeline:
            kind, option = "PipelineTeacher", "--objective.teacher.pipeline"
        raise ValueError(
            f"the objective {name} has no teacher, since an option replaces that of "
            f"{request.method}: pass --objective {name} with --objective.teacher {kind} and "
            f"{option} {request.teacher}, or train without one by diffcore train"
        )


def _check_sampling(trainer: Trainer) -> None:
    """Raise ValueError if the student cannot be sampled as its settings define."""
    process = trainer.process
    knots = trainer.grid.knots(process.schedule, trainer.sample_steps)
    check_levels(process, knots)
    check_guidance(
        process, knots, [0] if process.dropouts else None, trainer.guidance, trainer.sampler
    )


def _report_straightness(trainer: Trainer) -> None:
    """Print and write the straightness of the flows of the teacher and of the student."""
    from diffcore.distillation import FlowPairs
    from diffcore.distillation.straightness import straightness

    pairs = trainer.data
    if not isinstance(pairs, FlowPairs):
        return
    labels = None if pairs.labels is None else pairs.labels[:TRAJECTORIES]
    seeds = range(TRAJECTORIES if labels is None else len(labels))
    flows = {"teacher": pairs.teacher.denoiser(), "student": trainer.run.denoiser()}
    values = {name: straightness(flow, seeds, labels) for name, flow in flows.items()}
    write_file(trainer.folder / "straightness.json", json.dumps(values, indent=2).encode())
    print(
        f"diffcore: straightness of the flow (0 is straight): {values['student']:.4g}, of the "
        f"teacher's {values['teacher']:.4g}",
        file=sys.stderr,
    )
