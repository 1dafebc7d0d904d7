"""`python scripts/benchmark.py NAME`: measure a table of docs/benchmarks.md."""

import argparse
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import torch
from benchmarks.comparison import Comparison, coverage
from benchmarks.table import markdown_table


class _BenchmarkParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}\n")


def main() -> None:
    """Measure and print tables with the command that made them; slow ratios are no errors."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"threads is {arguments.threads}, expected at least 1")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # of diffusers
    try:
        result = arguments.measure(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.out:
        facts = {"command": _command(), "where": _describe_machine(arguments.threads), **result}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = _BenchmarkParser(description="Measure a table of docs/benchmarks.md and print it.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    for measure, text, pairs in (
        (overhead, "training and sampling of the digits network, beside bare PyTorch", 40),
        (training, "training steps of the digits network, beside bare PyTorch and diffusers", 60),
        (steps, "50 steps with a network without cost, beside diffusers", 100),
        (pipeline, "a StableDiffusionPipeline with diffcore's scheduler, beside diffusers", 40),
        (guidance, "Interval beside CFG over the same knots, on the digits network", 40),
        (folder, "second start of training on a folder of images, beside a small one", None),
        (accuracy, "distance to the exact flow by evaluations, beside diffusers", None),
    ):
        benchmark = benchmarks.add_parser(measure.__name__, help=text, description=text)
        benchmark.set_defaults(measure=measure)
        threads = torch.get_num_threads()
        options: dict[str, tuple[type, object, str]] = {
            "--threads": (int, threads, f"processor threads (default {threads})"),
            "--out": (Path, None, "JSON file of all measurements (default none)"),
        }
        if pairs:
            help_text = f"measured pairs, at least 30 (default {pairs})"
            options["--pairs"] = (int, pairs, help_text)
        if measure in (overhead, training):
            options["--steps"] = (int, 1, "training steps of one measurement (default 1)")
        if measure in (overhead, guidance):
            options["--samples"] = (int, 64, "samples of one measurement (default 64)")
        if measure is folder:
            options["--images"] = (int, 100_000, "images of the large folder (default 100000)")
            options["--repeats"] = (int, 5, "trainings on each folder (default 5)")
        if measure is accuracy:
            starts = "starts of each oracle, twice as many of the digits (default 128)"
            options["--starts"] = (int, 128, starts)
            picture = "picture of the best of each side over evaluations (default none)"
            options["--picture"] = (Path, None, picture)
        for option, (cls, default, help_text) in options.items():
            benchmark.add_argument(option, type=cls, default=default, help=help_text)
    return parser


def overhead(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare training and sampling with bare PyTorch, and return facts for JSON."""
    from benchmarks.training_speed import measure_overhead

    comparisons = measure_overhead(arguments.pairs, arguments.steps, arguments.samples)
    return _print_comparisons(arguments, comparisons, ("ours, ms", "bare, ms", "at most"))


def training(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare training with bare PyTorch and diffusers' example, and return facts for JSON."""
    from benchmarks.training_speed import measure_memory, measure_training

    comparisons = measure_training(arguments.pairs, arguments.steps)
    names = ("ours, ms", "other, ms", "at most")
    facts = _print_comparisons(arguments, comparisons, names)
    memory = measure_memory()
    print()
    rows = [[side, f"{size:.0f}"] for side, size in memory.items()]
    print(markdown_table(["training in a process of its own", "peak memory, MiB"], rows))
    return facts | {"memory": memory}


def steps(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare the cost of steps with diffusers, and return facts for JSON."""
    from benchmarks.step_overhead import measure_steps

    comparisons = measure_steps(arguments.pairs)
    return _print_comparisons(arguments, comparisons, ("ours, ms", "diffusers, ms", "at most"))


def pipeline(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare the cost of pipeline calls with diffusers, and return facts for JSON."""
    from benchmarks.pipeline_overhead import measure_pipelines

    comparisons = measure_pipelines(arguments.pairs)
    return _print_comparisons(arguments, comparisons, ("ours, ms", "diffusers, ms", "at most"))


def guidance(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare Interval with CFG, and return facts for JSON."""
    from benchmarks.training_speed import measure_intervals

    comparisons = measure_intervals(arguments.pairs, arguments.samples)
    return _print_comparisons(arguments, comparisons, ("Interval, ms", "CFG, ms", "evaluations"))


def accuracy(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure the distance to the exact flow, and return facts for JSON."""
    from benchmarks import accuracy_report as report
    from benchmarks.accuracy import measure_accuracy, measure_diffcore
    from benchmarks.schedulers import measure_diffusers

    sides = {"ours": measure_diffcore, "diffusers": measure_diffusers}
    measurements = list(measure_accuracy(sides, arguments.starts))
    default, digit_starts = report.default_name(), 2 * arguments.starts
    print(f"`{_command()}`: {arguments.starts} starts; default: {default}\n")
    print(report.format_summary(measurements, default, digit_starts))
    for oracle in dict.fromkeys(measurement.oracle for measurement in measurements):
        print(f"\n{oracle}\n\n{report.format_methods(measurements, oracle)}")
    ranking = report.rank_combinations(measurements, digit_starts)[:20]
    rows = [[f"{mean:.2f}", f"{maximum:.2f}", name] for mean, maximum, name in ranking]
    header = ["over our closest: geometric mean", "maximum", "sampler and grid"]
    print(f"\n{markdown_table(header, rows)}")
    if arguments.picture:
        report.draw(measurements, default, arguments.picture)
    rows_json = [vars(measurement) for measurement in measurements]
    return {"starts": arguments.starts, "default": default, "rows": rows_json}


def folder(arguments: argparse.Namespace) -> dict[str, object]:
    """Compare the start of training on a large and a small folder, and return facts for JSON."""
    from benchmarks.folder_start import measure_starts

    with TemporaryDirectory() as temporary:
        starts = measure_starts(Path(temporary), (100, arguments.images), arguments.repeats)
    rows = [[f"{value:.5g}" for value in start] for start in starts]
    print(f"`{_command()}`: {_describe_machine(arguments.threads)}\n")
    print(markdown_table(["images", "seconds", "seconds of processors", "memory, MB"], rows))
    return {"starts": [start._asdict() for start in starts]}


def _print_comparisons(
    arguments: argparse.Namespace, comparisons: Sequence[Comparison], names: tuple[str, str, str]
) -> dict[str, object]:
    """Print the table of comparisons; `names` are its columns of both sides and of the bound."""
    machine = _describe_machine(arguments.threads)
    print(f"`{_command()}`: {arguments.pairs} pairs, {machine}\n")
    interval = f"{coverage(arguments.pairs):.0%} interval"
    header = ["work", names[0], names[1], "ratio", interval, names[2]]
    print(markdown_table(header, [comparison.cells for comparison in comparisons]))
    return {"comparisons": [comparison.to_json() for comparison in comparisons]}


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _describe_machine(threads: int) -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return f"{threads} threads, {device}, torch {torch.__version__}, {platform.machine()}"


if __name__ == "__main__":
    main()
