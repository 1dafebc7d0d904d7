"""`diffcore plot`: draw any number of noise schedules or loss weights into one figure."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.cli.training.recipes import find_settings, read_settings
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import describe_component, from_spec
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import Weight
from diffcore.report.figures import (
    Theme,
    create_figure,
    figure_theme,
    line_styles,
    save_figure,
)
from diffcore.schedules import Schedule

__all__ = [
    "TrainingLevels",
    "draw_schedules",
    "draw_weights",
    "effective_weight",
    "main",
    "read_training_levels",
]

LOGSNR_RANGE = (-15.0, 15.0)
LOGSNR = torch.linspace(*LOGSNR_RANGE, 1501, dtype=torch.float64)
LOGSNR_LABEL = "λ = log α²/σ²"
TIME_LABEL = "t  (0 is data, 1 is noise)"
TARGETS = {
    "epsilon": "ε",
    "sample": "x_0",
    "v_prediction": "v",
    "flow_prediction": "ε - x_0",
    "edm": "EDM's output",
}
USAGE = """usage: diffcore plot schedules SCHEDULE ... [--out schedules.png]
       diffcore plot weights [WEIGHT ...] [--configs RECIPE,FILE.yaml] [--on epsilon]
                             [--out weights.png]

`diffcore plot schedules --help` and `diffcore plot weights --help` describe the options."""
COMPONENTS = (
    "{0}s to draw, each by class name, such as {1}, or with options as "
    "'{{class_path: {1}, init_args: {{{2}}}}}'"
)


class TrainingLevels(NamedTuple):
    """The part of training settings that decides how strongly each noise level is trained.

    Args:
        name: name in the legend.
        process: the schedule is the density of training levels.
        objective: holds the loss weight.
    """

    name: str
    process: Process
    objective: Objective


def main(argv: Sequence[str]) -> None:
    """Draw schedules or weights, as the first word names.

    Args:
        argv: command-line words after `plot`.
    """
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "schedules": _plot_schedules,
        "weights": _plot_weights,
    }
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        print(USAGE)
        return
    if first not in commands:
        raise ValueError(f"expected schedules or weights to plot, got {first!r}")
    commands[first](argv[1:])


def _plot_schedules(argv: Sequence[str]) -> None:
    parser = _parser("schedules", "Draw schedules: λ(t), α(t) and σ(t), and the density p(λ).")
    parser.add_argument(
        "components",
        type=Schedule,
        nargs="+",
        help=COMPONENTS.format("schedule", "Laplace", "scale: 0.75"),
    )
    arguments = parser.instantiate(parser.parse_args(list(argv)))
    with figure_theme(arguments.theme):
        draw_schedules(arguments.components, _checked(arguments.out))
    print(f"{len(arguments.components)} schedules -> {arguments.out}")


def _plot_weights(argv: Sequence[str]) -> None:
    parser = _parser(
        "weights",
        "Draw loss weights w(λ), and effective weights w(λ) p(λ) of training settings, p being the "
        "density of training noise levels.",
    )
    parser.add_argument(
        "components",
        type=Weight,
        nargs="*",
        default=[],
        help=COMPONENTS.format("weight", "MinSNR", "gamma: 3"),
    )
    parser.add_argument(
        "--configs",
        type=str,
        default="",
        help="recipes or YAML files whose effective weights to draw, such as digits,my.yaml",
    )
    parser.add_argument(
        "--on",
        type=PredictionType,
        default="v_prediction",
        help="network output whose squared error the weights multiply",
    )
    parser.add_argument(
        "--sigma_data",
        type=float,
        default=0.5,
        help="standard deviation of the data, which EDM's weight and output depend on",
    )
    arguments = parser.instantiate(parser.parse_args(list(argv)))
    trainings = [read_training_levels(name) for name in arguments.configs.split(",") if name]
    if not (arguments.components or trainings):
        raise ValueError("name a weight (MinSNR), or a training config with --configs digits")
    out = _checked(arguments.out)
    with figure_theme(arguments.theme):
        draw_weights(arguments.components, trainings, arguments.on, arguments.sigma_data, out)
    print(
        f"{len(arguments.components)} weights, {len(trainings)} training configs -> {arguments.out}"
    )


def _parser(command: str, description: str) -> ComponentParser:
    parser = ComponentParser(prog=f"diffcore plot {command}", description=description)
    parser.add_argument(
        "--out", type=Path, default=Path(f"{command}.png"), help="file to write: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--theme",
        type=Theme,
        default="light",
        help="dark lines on white, or light lines on a dark page",
    )
    return parser


def _checked(out: Path) -> Path:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out is {out}, expected a .png, .svg or .pdf")
    return out


def read_training_levels(name: str) -> TrainingLevels:
    """Read the process and the objective of training settings.

    Args:
        name: name of a recipe, or path of a YAML file.

    Returns:
        The process and the objective, named after the file.

    Raises:
        ValueError: the settings are not found, or leave a part of their process to a pipeline.
    """
    settings = read_settings(find_settings(name))
    try:
        process = from_spec(Process, settings.get("process") or {})
    except ValueError as error:
        raise ValueError(
            f"{name} does not define its whole process ({error}): if a pipeline completes it, name "
            "the run's config.yaml"
        ) from None
    objective = from_spec(Objective, settings.get("objective") or {})
    return TrainingLevels(Path(name).stem, process, objective)


def effective_weight(training: TrainingLevels, on: PredictionType, logsnr: Tensor) -> Tensor:
    """How strongly training weights the squared error of a network output at each level: w(λ) p(λ).

    Args:
        training: process and objective.
        on: network output whose squared error is weighted.
        logsnr: λ, of any shape.

    Returns:
        The weight, in the shape of `logsnr`; w(λ) within the schedule if the objective is corrected
        for p.
    """
    weight = training.objective.weight.target_weight(on, logsnr, training.process.sigma_data)
    density = training.process.schedule.density(logsnr)
    return weight * (density > 0) if training.objective.corrected else weight * density


def draw_schedules(schedules: Sequence[Schedule], out: Path) -> None:
    """Write the figure of schedules: λ(t), α(t) and σ(t), and p(λ).

    Args:
        schedules: one curve each.
        out: file to write.
    """
    figure, (left, middle, right) = create_figure(3)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for schedule, style in zip(schedules, line_styles(len(schedules)), strict=True):
        level = schedule.level(t)
        left.plot(t, level.logsnr, **style)
        middle.plot(t, level.alpha, **style)
        middle.plot(t, level.sigma, **{**style, "lw": 1})
        right.plot(LOGSNR, schedule.density(LOGSNR), label=_name(schedule), **style)
    left.set(title="noise level", xlabel=TIME_LABEL, ylabel=LOGSNR_LABEL, ylim=LOGSNR_RANGE)
    middle.set(title="α (thick) and σ (thin)", xlabel=TIME_LABEL, ylim=(-0.03, 1.1))
    right.set(
        title="density of training levels",
        xlabel=LOGSNR_LABEL,
        ylabel="p(λ) = -dt/dλ",
        ylim=(0, None),
    )
    save_figure(figure, out)


def draw_weights(
    weights: Sequence[Weight],
    trainings: Sequence[TrainingLevels],
    on: PredictionType,
    sigma_data: float,
    out: Path,
) -> None:
    """Write the figure of weights, and of effective weights, which are scaled to area 1.

    Args:
        weights: one curve each in the left panel.
        trainings: one curve each in the right panel.
        on: network output whose squared error is weighted.
        sigma_data: standard deviation of the data, for the weights.
        out: file to write.
    """
    figure, axes = create_figure(bool(weights) + bool(trainings))
    styles = list(line_styles(len(weights) + len(trainings)))
    if weights:
        for weight, style in zip(weights, styles, strict=False):
            axes[0].plot(
                LOGSNR, weight.target_weight(on, LOGSNR, sigma_data), label=_name(weight), **style
            )
        title = f"weight on the squared error of {TARGETS[on]}"
        axes[0].set(title=title, ylabel="w(λ)", xlabel=LOGSNR_LABEL)
        axes[0].set(yscale="log", ylim=(1e-4, 1e4))
    for training, style in zip(trainings, styles[len(weights) :], strict=True):
        curve = effective_weight(training, on, LOGSNR)
        axes[-1].plot(LOGSNR, curve / torch.trapezoid(curve, LOGSNR), label=training.name, **style)
    if trainings:
        title = f"effective weight on the squared error of {TARGETS[on]}"
        axes[-1].set(title=title, ylabel="w(λ) p(λ), area 1", xlabel=LOGSNR_LABEL, ylim=(0, None))
    save_figure(figure, out)


def _name(component: object) -> str:
    """The constructor call without defaults: `Cosine`, `Laplace(scale=0.75)`."""
    arguments = [
        f"{field.name}={describe_component(value)}"
        for field in fields(component)  # type: ignore[arg-type]
        if (value := getattr(component, field.name)) != field.default
    ]
    return type(component).__name__ + (f"({', '.join(arguments)})" if arguments else "")
