"""`diffcore report`: write the report of a run as one page of HTML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffcore.cli.commands.info import describe_machine, describe_run
from diffcore.cli.commands.plot import LOGSNR, effective_weight, read_training_levels
from diffcore.io.files import hash_file, write_file
from diffcore.io.parser import ComponentParser
from diffcore.io.plain_data import read_json
from diffcore.io.specs import describe_spec
from diffcore.report.charts import Curve, line_chart
from diffcore.report.comparison_section import comparison_section
from diffcore.report.page import (
    Section,
    chart_grid,
    facts_table,
    page,
    picture_slider,
    text_block,
)
from diffcore.run import Run
from diffcore.training.reports.metrics import Metrics

__all__ = ["main", "write_report"]

LEVELS_SHOWN = 4
"""Number of intervals of noise levels in one chart over the steps."""
TRAINING = {"loss": "loss", "grad_norm": "norm of the gradient", "lr": "learning rate"}
"""Entry of a report -> heading of its chart."""
NOISE = ["noise_scale", "grad_variance", "grad_square"]
MEMORY = {
    "memory_allocated": "allocated",
    "memory_reserved": "reserved",
    "memory_resident": "resident",
}
"""Entry of speed.jsonl -> name of its curve."""
NOISE_REPORTS = 10
"""Number of reports over which the two parts of the noise scale are averaged."""
Reports = list[dict[str, Any]]


def main(argv: Sequence[str]) -> None:
    """Write the page of the run that the first word names.

    Args:
        argv: command-line words after `report`.
    """
    parser = ComponentParser(
        prog="diffcore report",
        description="Write the report of the run in folder RUN as one page of HTML, which needs no "
        "network: losses, held-out losses by noise level, preview samples, schedule, effective "
        "weight, settings and environment.",
    )
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=str, default="", help='file to write; "": report.html in the run\'s folder'
    )
    arguments = parser.parse_args(list(argv))
    run = Run(arguments.run)
    out = Path(arguments.out or run.folder / "report.html")
    write_report(run, out)
    print(f"{run.folder} -> {out}")


def write_report(run: Run, out: Path) -> None:
    """Write the page of a run.

    Args:
        run: folder of the run.
        out: file to write.

    Raises:
        ValueError: the folder holds no run, or one without config.yaml.
    """
    facts = describe_run(run)
    metrics = Metrics(run.metrics)
    reports = metrics.complete_reports(
        [*TRAINING, "skipped"],
        optional=[*NOISE, *_further_entries(metrics.reports())],
        optional_lists=["logsnr", "loss_by_level"],
    )
    speeds = Metrics(run.speed).complete_reports(["images_per_second"], optional=list(MEMORY))
    held_out = Metrics(run.validation).complete_reports(
        ["loss", "loss_current"], ["logsnr", "loss_by_level"]
    )
    steps = f"{reports[-1]['step']} steps" if reports else "no report yet"
    weights = _hash_weights(run)
    sections = [
        Section("Run", facts_table(facts)),
        Section(
            "Training",
            chart_grid(_training_charts(reports)),
            "Means over the steps since the report before.",
        ),
        Section(
            "Speed and memory",
            chart_grid(_speed_charts(speeds)),
            "Speed includes previews, held-out losses and checkpoints. Memory is the largest so "
            "far of any rank.",
        ),
        Section(
            "Held-out data",
            chart_grid(_held_out_charts(held_out)),
            "The loss at fixed levels with fixed noise; by level, of the averaged weights.",
        ),
        Section(
            "Samples during training",
            picture_slider(_previews(run)),
            "Drawn from the same seeds by the averaged weights.",
        ),
        Section(
            "Evaluation",
            facts_table(_evaluation(run, weights)),
            "The content of evaluation.json.",
        ),
        comparison_section(run, weights),
        Section(
            "Likelihood",
            facts_table(_likelihood(run, weights)),
            "Bits per dimension, by method and data: the content of likelihood.json.",
        ),
        Section("Noise levels", chart_grid(_level_charts(run))),
        Section("Settings", text_block(run.config.read_text("utf-8"))),
        Section(
            "Environment",
            facts_table(describe_machine()),
            "Of the machine that wrote this page.",
        ),
    ]
    title = f"Run {run.folder.resolve().name}"
    html = page(title, f"{facts['network']}; {steps}.", sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, html.encode())


def _training_charts(reports: Reports) -> dict[str, str]:
    charts = {
        title: line_chart(title, {title: _over_steps(reports, name)}, "step", _scale(name))
        for name, title in TRAINING.items()
        if reports
    }
    charts |= _further_charts(reports)
    charts |= _level_curves("loss by noise level", reports)
    charts |= _noise_chart(reports)
    if sum(report["skipped"] or 0 for report in reports):
        title = "steps that were not finite, since the report before"
        charts[title] = line_chart(title, {title: _over_steps(reports, "skipped")}, "step")
    return charts


def _further_entries(reports: Reports) -> list[str]:
    """Entries of the networks that were trained beside that of the run, such as loss/fake."""
    prefixes = tuple(f"{name}/" for name in TRAINING)
    return sorted({key for report in reports for key in report if key.startswith(prefixes)})


def _further_charts(reports: Reports) -> dict[str, str]:
    """Losses, gradient norms and learning rates of the further networks of the run."""
    charts = {}
    for name, title in TRAINING.items():
        entries = [key for key in _further_entries(reports) if key.startswith(f"{name}/")]
        complete = [report for report in reports if all(key in report for key in entries)]
        if entries and complete:
            curves = {key.removeprefix(f"{name}/"): _over_steps(complete, key) for key in entries}
            heading = f"{title} of {', '.join(curves)}"
            values = [y for curve in curves.values() for y in curve.y if y is not None]
            scale: Any = _scale(name) if min(values, default=0) > 0 else "linear"
            charts[heading] = line_chart(heading, curves, "step", scale)
    return charts


def _level_curves(title: str, reports: Reports) -> dict[str, str]:
    """The loss of some intervals of noise levels over the steps."""
    reports = [
        report
        for report in reports
        if report.get("loss_by_level")
        and len(report.get("logsnr", [])) == len(report["loss_by_level"]) + 1
    ]
    if not reports:
        return {}
    # The number of intervals may change when a run is resumed.
    last = reports[-1]
    reports = [r for r in reports if len(r["loss_by_level"]) == len(last["loss_by_level"])]
    bins = range(len(last["loss_by_level"]))
    shown = sorted({round(i * (len(bins) - 1) / (LEVELS_SHOWN - 1)) for i in range(LEVELS_SHOWN)})
    curves = {
        _interval(last["logsnr"], bin_): Curve(
            [report["step"] for report in reports],
            [report["loss_by_level"][bin_] for report in reports],
        )
        for bin_ in shown
    }
    return {title: line_chart(title, curves, "step", "log")}


def _noise_chart(reports: Reports) -> dict[str, str]:
    """The gradient noise scale, from means of its two parts over some reports."""
    known = [
        report
        for report in reports
        if all(report.get(name) is not None for name in ("grad_variance", "grad_square"))
    ]
    scales: list[float | None] = []
    for end in range(1, len(known) + 1):
        last = known[max(end - NOISE_REPORTS, 0) : end]
        variance = sum(report["grad_variance"] for report in last)
        square = sum(report["grad_square"] for report in last)
        scales.append(variance / square if min(variance, square) > 0 else None)
    if not any(scales):
        return {}
    title = f"gradient noise scale in samples, over {NOISE_REPORTS} reports"
    curve = Curve([report["step"] for report in known], scales)
    return {title: line_chart("gradient noise scale", {title: curve}, "step", "log")}


def _speed_charts(speeds: Reports) -> dict[str, str]:
    if not speeds:
        return {}
    title = "images per second"
    charts = {
        title: line_chart(title, {title: _over_steps(speeds, title.replace(" ", "_"))}, "step")
    }
    curves = {
        name: Curve(
            [report["step"] for report in speeds],
            [None if report.get(key) is None else report[key] / 2**30 for report in speeds],
        )
        for key, name in MEMORY.items()
        if any(report.get(key) is not None for report in speeds)
    }
    if curves:
        title = f"{' and '.join(curves)} memory in GiB"
        charts[title] = line_chart(title, curves, "step")
    return charts


def _held_out_charts(held_out: Reports) -> dict[str, str]:
    if not held_out:
        return {}
    names = {"averaged weights": "loss", "current weights": "loss_current"}
    curves = {title: _over_steps(held_out, name) for title, name in names.items()}
    charts = {"held-out loss": line_chart("held-out loss", curves, "step", "log")}
    charts |= _level_curves("held-out loss by noise level", held_out)
    last = held_out[-1]
    bins = range(len(last["loss_by_level"]))
    held_out = [r for r in held_out if len(r["loss_by_level"]) == len(bins)]
    times = [(bin_ + 0.5) / len(bins) for bin_ in bins]
    profile = {
        f"step {report['step']}": Curve(times, report["loss_by_level"])
        for report in (last, held_out[0])
    }
    title = "held-out loss over noise levels"
    charts[title] = line_chart(title, profile, "t  (0 is data, 1 is noise)", "log", xlim=(0, 1))
    return charts


def _level_charts(run: Run) -> dict[str, str]:
    try:
        training = read_training_levels(str(run.config))
    except ValueError:
        return {}  # a pipeline completes the process
    schedule = training.process.schedule
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    level = schedule.level(t)
    weight = effective_weight(training, training.process.prediction, LOGSNR)
    weight = weight / torch.trapezoid(weight, LOGSNR)
    density = schedule.density(LOGSNR)
    time, logsnr = "t  (0 is data, 1 is noise)", "λ = log α²/σ²"
    return {
        "λ over t": line_chart(
            "λ over t", {"λ": _curve(t, level.logsnr)}, time, ylim=(-15.0, 15.0)
        ),
        "α and σ over t": line_chart(
            "α and σ", {"α": _curve(t, level.alpha), "σ": _curve(t, level.sigma)}, time
        ),
        "training levels and effective weight, area 1": line_chart(
            "effective weight",
            {"p(λ)": _curve(LOGSNR, density), "w(λ) p(λ)": _curve(LOGSNR, weight)},
            logsnr,
        ),
    }


def _hash_weights(run: Run) -> str:
    """The hash of the averaged weights; "" without such a file, or without results to compare."""
    results = (run.evaluation, run.comparison, run.likelihood)
    is_needed = run.weights.is_file() and any(path.is_file() for path in results)
    return hash_file(run.weights) if is_needed else ""


def _evaluation(run: Run, weights: str) -> dict[str, str]:
    """The results in evaluation.json by their names, and whether they belong to the weights."""
    if not run.evaluation.is_file():
        return {}
    results = read_json(run.evaluation)
    facts = {
        str(name).replace("_", " "): describe_spec(value, _rounded)
        for name, value in results.items()
    }
    if "weights" in facts and weights:
        facts["weights"] = f"{_compare_weights(results, weights)}; SHA-256 {facts['weights']}"
    return facts


def _compare_weights(results: Mapping[str, Any], weights: str) -> str:
    """Whether results are those of the weights that the run has."""
    is_current = results.get("weights") == weights
    return "those of the run" if is_current else "NOT those of the run now: evaluate it again"


def _likelihood(run: Run, weights: str) -> dict[str, str]:
    """The results in likelihood.json by method and data, and whether they belong to the weights."""
    if not run.likelihood.is_file():
        return {}
    return {
        str(name): f"{_rounded(found.get('bits_per_dimension'))} ± "
        f"{_rounded(found.get('standard_error'))} (standard error), {found.get('data')}; "
        f"weights: {_compare_weights(found, weights)}"
        for name, found in read_json(run.likelihood).items()
        if isinstance(found, dict)
    }


def _rounded(value: Any) -> str:
    """A number with four digits, or the value itself."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _previews(run: Run) -> dict[str, Path]:
    paths = sorted(run.samples.glob("step-*.png"))
    return {f"step {int(path.stem.removeprefix('step-'))}": path for path in paths}


def _over_steps(reports: Reports, name: str) -> Curve:
    return Curve([report["step"] for report in reports], [report[name] for report in reports])


def _curve(x: torch.Tensor, y: Any) -> Curve:
    return Curve(x.tolist(), torch.where(y.isfinite(), y, torch.nan).tolist())


def _scale(name: str) -> Any:
    return "linear" if name == "lr" else "log"


def _interval(bounds: list[float | None], bin_: int) -> str:
    """The λ of an interval of levels, whose bounds fall from clean to noise."""
    high, low = bounds[bin_], bounds[bin_ + 1]
    return f"λ {'-∞' if low is None else f'{low:.1f}'} to {'∞' if high is None else f'{high:.1f}'}"
