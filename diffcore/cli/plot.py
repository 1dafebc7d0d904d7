"""`diffcore plot schedules` and `diffcore plot weights`: any number of them overlaid."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from diffcore.cli.arguments import normalized, trusted
from diffcore.cli.figures import figure, save, styles
from diffcore.cli.train import resolved
from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import from_spec
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import Weight
from diffcore.schedules import Schedule

SPAN = (-15.0, 15.0)
LEVELS = torch.linspace(*SPAN, 1501, dtype=torch.float64)
SNR = "λ = log α²/σ²"
SYMBOLS = {
    "epsilon": "ε",
    "sample": "x_0",
    "v_prediction": "v",
    "flow_prediction": "ε - x_0",
    "edm": "EDM's output",
}

USAGE = """usage: diffcore plot schedules SCHEDULE ... [--out schedules.png]
       diffcore plot weights [WEIGHT ...] [--configs RECIPE,FILE.yaml] [--on epsilon] [--out weights.png]

Each has a --help of its own."""


class Training(NamedTuple):
    """What decides the effective weight of a training config."""

    name: str
    process: Process
    objective: Objective


def main(argv: Sequence[str]) -> None:
    """Draw what the first argument names."""
    kinds: dict[str, Callable[[Sequence[str]], None]] = {
        "schedules": _schedules,
        "weights": _weights,
    }
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        print(USAGE)
        return
    if first not in kinds:
        raise ValueError(f"expected schedules or weights to plot, got {first!r}")
    kinds[first](trusted(normalized(argv[1:])))


def _schedules(argv: Sequence[str]) -> None:
    parser = _parser("schedules", "Draw schedules: λ(t), α(t) and σ(t), and the density p(λ).")
    parser.add_argument(
        "components",
        type=Schedule,
        nargs="+",
        help="by class name, or {class_path: ..., init_args: ...}",
    )
    arguments = parser.instantiate(parser.parse_args(argv))
    draw_schedules(arguments.components, _checked(arguments.out))
    print(f"{len(arguments.components)} schedules -> {arguments.out}")


def _weights(argv: Sequence[str]) -> None:
    parser = _parser(
        "weights",
        "Draw weights w(λ), and the effective weights w(λ) p(λ) of whole training configs.",
    )
    parser.add_argument(
        "components",
        type=Weight,
        nargs="*",
        default=[],
        help="by class name, or {class_path: ..., init_args: ...}",
    )
    parser.add_argument(
        "--configs", type=str, default="", help="recipes or YAML files, such as digits,my.yaml"
    )
    parser.add_argument(
        "--on",
        type=PredictionType,
        default="v_prediction",
        help="whose squared error the weight is on",
    )
    parser.add_argument(
        "--sigma_data", type=float, default=0.5, help="of the data, for EDM's weight and output"
    )
    arguments = parser.instantiate(parser.parse_args(argv))
    trainings = [_training(name) for name in arguments.configs.split(",") if name]
    if not (arguments.components or trainings):
        raise ValueError("name a weight (MinSNR), or a training config with --configs digits")
    draw_weights(
        arguments.components, trainings, arguments.on, arguments.sigma_data, _checked(arguments.out)
    )
    print(
        f"{len(arguments.components)} weights, {len(trainings)} training configs -> {arguments.out}"
    )


def _parser(what: str, description: str) -> ComponentParser:
    parser = ComponentParser(prog=f"diffcore plot {what}", description=description)
    parser.add_argument(
        "--out", type=Path, default=Path(f"{what}.png"), help="a .png, .svg or .pdf"
    )
    return parser


def _checked(out: Path) -> Path:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out is {out}, expected a .png, .svg or .pdf")
    return out


def _training(name: str) -> Training:
    """The process and objective of a recipe or a YAML file.

    Raises:
        ValueError: it leaves some of its process to a pipeline.
    """
    settings: Mapping[str, Any] = yaml.safe_load(Path(resolved(name)).read_text())
    try:
        process = from_spec(Process, settings.get("process") or {})
    except ValueError as error:
        raise ValueError(
            f"{name} does not say its whole process ({error}): where a pipeline does, give the run's config.yaml"
        ) from None
    return Training(Path(name).stem, process, from_spec(Objective, settings.get("objective") or {}))


def effective(training: Training, on: PredictionType, logsnr: Tensor) -> Tensor:
    """w(λ) p(λ) on the squared error of a target; w(λ) alone where the objective is corrected for p."""
    weight = training.objective.weight.on(on, logsnr, training.process.sigma_data)
    density = training.process.schedule.density(logsnr)
    return weight * (density > 0) if training.objective.corrected else weight * density


def draw_schedules(schedules: Sequence[Schedule], out: Path) -> None:
    """Write the picture of some schedules."""
    made, (left, middle, right) = figure(3)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for schedule, style in zip(schedules, styles(len(schedules)), strict=True):
        level = schedule.level(t)
        left.plot(t, level.logsnr, label=_short(schedule), **style)
        middle.plot(t, level.alpha, **style)
        middle.plot(t, level.sigma, **{**style, "lw": 1})
        right.plot(LEVELS, schedule.density(LEVELS), **style)
    left.set(title="noise level", xlabel="t  (0 is data, 1 is noise)", ylabel=SNR, ylim=SPAN)
    middle.set(
        title="α (thick) and σ (thin)", xlabel="t  (0 is data, 1 is noise)", ylim=(-0.03, 1.1)
    )
    right.set(
        title="density of training levels", xlabel=SNR, ylabel="p(λ) = -dt/dλ", ylim=(0, None)
    )
    save(made, out)


def draw_weights(
    weights: Sequence[Weight],
    trainings: Sequence[Training],
    on: PredictionType,
    sigma_data: float,
    out: Path,
) -> None:
    """Write the picture of some weights, and of the effective weights of some trainings, each scaled to area 1."""
    made, axes = figure(bool(weights) + bool(trainings))
    looks = list(styles(len(weights) + len(trainings)))
    if weights:
        for weight, style in zip(weights, looks, strict=False):
            axes[0].plot(LEVELS, weight.on(on, LEVELS, sigma_data), label=_short(weight), **style)
        axes[0].set(
            title=f"weight on the squared error of {SYMBOLS[on]}", ylabel="w(λ)", xlabel=SNR
        )
        axes[0].set(yscale="log", ylim=(1e-4, 1e4))
    for training, style in zip(trainings, looks[len(weights) :], strict=True):
        curve = effective(training, on, LEVELS)
        axes[-1].plot(LEVELS, curve / torch.trapezoid(curve, LEVELS), label=training.name, **style)
    if trainings:
        title = f"effective weight on the squared error of {SYMBOLS[on]}"
        axes[-1].set(title=title, ylabel="w(λ) p(λ), area 1", xlabel=SNR, ylim=(0, None))
    save(made, out)


def _short(component: object) -> str:
    """The constructor call without what a legend does not need."""
    return repr(component).replace("scaling='vp', ", "").replace("scaling='vp'", "")
