"""`python scripts/benchmark.py NAME`: measure a table of docs/benchmarks.md, or `all` of them."""

import argparse
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from benchmarks.comparison import Comparison
from benchmarks.table import markdown_table

from diffcore.evaluation.flow.order_statistics import coverage

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = ("diffusers", "k-diffusion", "azula", "torchcfm", "denoising-diffusion-pytorch")
"""Packages whose versions are written beside the numbers."""
SIDES = ("ours, ms", "other, ms", "at most")


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
    for text in result.get("blocks", {}).values():
        print(f"\n{text}")
    if arguments.out:
        where = _describe_machine(arguments.threads)
        facts = {"command": _command(), "where": where, **result}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = _BenchmarkParser(description="Measure a table of docs/benchmarks.md and print it.")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    for measure, text, pairs in (
        (overhead, "training and sampling of the digits network, beside bare PyTorch", 40),
        (training, "training steps of the digits network, beside bare PyTorch and diffusers", 60),
        (peers, "training steps of the digits network, beside the losses of other libraries", 40),
        (steps, "50 steps with a network without cost, beside diffusers", 100),
        (pipeline, "a StableDiffusionPipeline with diffcore's scheduler, beside diffusers", 40),
        (guidance, "Interval beside CFG over the same knots, on the digits network", 40),
        (start_up, "seconds until a program starts, beside torch and diffusers", 12),
        (folder, "second start of training on a folder of images, beside a small one", None),
        (memory, "peak memory of fine-tuning by option", None),
        (serve, "mixed requests to a service, together and one at a time", None),
        (accuracy, "distance to the exact flow by evaluations, beside diffusers", None),
        (all_benchmarks, "all of them, which rewrites docs/benchmarks.md", None),
    ):
        name = "all" if measure is all_benchmarks else measure.__name__
        benchmark = benchmarks.add_parser(name, help=text, description=text)
        benchmark.set_defaults(measure=measure)
        threads = torch.get_num_threads()
        options: dict[str, tuple[type, object, str]] = {
            "--threads": (int, threads, f"processor threads (default {threads})"),
            "--out": (Path, None, "JSON file of all measurements (default none)"),
        }
        if pairs:
            least = 6 if measure is start_up else 30
            help_text = f"measured pairs, at least {least} (default {pairs})"
            options["--pairs"] = (int, pairs, help_text)
        if measure in (overhead, training, peers):
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
            help_text = "numbers of evaluations (default 5 8 10 15 20 30 50)"
            benchmark.add_argument("--counts", type=int, nargs="+", default=[], help=help_text)
            help_text = "measure k-diffusion and azula too, if they are installed"
            benchmark.add_argument("--peers", action="store_true", help=help_text)
        if measure is serve:
            options["--requests"] = (int, 200, "mixed requests (default 200)")
            options["--rows"] = (int, 16, "rows of each call of the network (default 16)")
        if measure is memory:
            benchmark.add_argument("--networks", nargs="+", default=["tiny", "large"])
        if measure is all_benchmarks:
            _add_suite_options(benchmark)
        for option, (cls, default, help_text) in options.items():
            benchmark.add_argument(option, type=cls, default=default, help=help_text)
    return parser


def _add_suite_options(benchmark: argparse.ArgumentParser) -> None:
    benchmark.add_argument(
        "--only", nargs="+", default=[], help="names of benchmarks (default all)"
    )
    benchmark.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of the pages that are rewritten"
    )
    benchmark.add_argument(
        "--quick",
        action="store_true",
        help="short benchmarks, whose numbers are not for the pages: give another --docs",
    )


def all_benchmarks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all benchmarks, rewrite the pages, and return the regressions."""
    from benchmarks.suite import PARTS, run_suite

    unknown = sorted({*arguments.only} - {part.name for part in PARTS})
    if unknown:
        names = ", ".join(part.name for part in PARTS)
        raise ValueError(f"only names {', '.join(unknown)}, expected some of {names}")
    if arguments.quick and arguments.docs.resolve() == DOCS.resolve():
        raise ValueError("quick numbers are not for docs/: give a copy of it, --docs FOLDER")
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    regressions = run_suite(parts, arguments.docs, arguments.quick)
    for line in regressions:
        print(f"worse than the stored measurements: {line}")
    return {"regressions": regressions}


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare training and sampling with bare PyTorch, and return facts for JSON."""
    from benchmarks.training_speed import measure_overhead

    comparisons = measure_overhead(arguments.pairs, arguments.steps, arguments.samples)
    return _comparison_facts(arguments, comparisons)


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare training with bare PyTorch and diffusers' example, and return facts for JSON."""
    from benchmarks.training_speed import measure_memory, measure_training

    comparisons = measure_training(arguments.pairs, arguments.steps)
    facts = _comparison_facts(arguments, comparisons)
    sizes = measure_memory()
    rows = [[side, f"{size:.0f}"] for side, size in sizes.items()]
    header = ["training in a process of its own", "peak memory, MiB"]
    facts["blocks"]["table"] += f"\n\n{markdown_table(header, rows)}"
    return facts | {"memory": sizes}


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare training with the losses of other libraries, and return facts for JSON."""
    from benchmarks.sides.peers import LOOPS
    from benchmarks.training_speed import measure_loops

    comparisons, absent = measure_loops(LOOPS, arguments.pairs, arguments.steps)
    if not comparisons:
        raise ValueError(f"no other library is installed: {'; '.join(absent)}")
    facts = _comparison_facts(arguments, comparisons)
    facts["blocks"]["table"] += "".join(f"\n\nNot measured: {reason}." for reason in absent)
    return facts | {"absent": absent}


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the cost of steps with diffusers, and return facts for JSON."""
    from benchmarks.step_overhead import measure_steps

    return _comparison_facts(arguments, measure_steps(arguments.pairs))


def pipeline(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the cost of pipeline calls with diffusers, and return facts for JSON."""
    from benchmarks.pipeline_overhead import measure_pipelines

    return _comparison_facts(arguments, measure_pipelines(arguments.pairs))


def guidance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare Interval with CFG, and return facts for JSON."""
    from benchmarks.training_speed import measure_intervals

    comparisons = measure_intervals(arguments.pairs, arguments.samples)
    names = ("Interval, ms", "CFG, ms", "evaluations")
    return _comparison_facts(arguments, comparisons, names, is_target=False)


def start_up(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the start of programs, and return facts for JSON."""
    from benchmarks.start_up import measure_start_up

    return _comparison_facts(arguments, measure_start_up(arguments.pairs))


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory of fine-tuning, and return facts for JSON."""
    from benchmarks.memory import OPTIONS, WIDTHS, measure_options

    unknown = sorted({*arguments.networks} - {*WIDTHS})
    if unknown:
        raise ValueError(f"networks are {arguments.networks}, expected some of {', '.join(WIDTHS)}")
    columns = [measure_options(network) for network in arguments.networks]
    rows = [[option, *(found[option] for _, found in columns)] for option in OPTIONS]
    header = ["option", *(f"{millions:.1f} million parameters" for millions, _ in columns)]
    sizes = {
        f"{option}, {millions:.1f} million parameters": float(peak)
        for millions, found in columns
        for option, peak in found.items()
        if peak.isdigit()
    }
    return {"blocks": _blocks(arguments, header, rows), "memory": sizes}


def accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the distance to the exact flow, and return facts for JSON."""
    from benchmarks import accuracy_report as report
    from benchmarks.accuracy import COUNTS, measure_accuracy
    from benchmarks.sides.peers import available_sides
    from benchmarks.sides.samplers import diffcore_combinations
    from benchmarks.sides.schedulers import diffusers_combinations
    from pictures.themes import draw_themes

    others, absent = available_sides() if arguments.peers else ({}, [])
    sides = {"ours": diffcore_combinations, "diffusers": diffusers_combinations, **others}
    counts = tuple(arguments.counts or COUNTS)
    measurements = list(measure_accuracy(sides, arguments.starts, counts))
    default, digit_starts = report.default_name(), 2 * arguments.starts
    line = f"{_introduction(arguments)}; {arguments.starts} starts; default: {default}"
    blocks = {"table": f"{line}\n\n{report.format_summary(measurements, default, digit_starts)}"}
    if arguments.peers:
        table = report.format_peers(measurements, default, [*others]) if others else ""
        blocks["accuracy-peers"] = "\n\n".join([table, *(f"Not measured: {it}." for it in absent)])
    blocks["accuracy-methods"] = report.format_all(measurements, digit_starts)
    if arguments.picture:
        draw_themes(partial(report.draw, measurements, default), arguments.picture)
    return {
        "blocks": blocks,
        "starts_of_oracles": arguments.starts,
        "default": default,
        "default_errors": report.default_errors(measurements, default, digit_starts),
        "rows": [vars(measurement) for measurement in measurements],
    }


def serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the service of continuous batching, and return facts for JSON."""
    from benchmarks.serving import measure_serving

    facts = measure_serving(arguments.requests, arguments.rows)
    rows = [
        [name, f"{value:.1f}", f"{facts.samples / value:.2f}"]
        for name, value in facts.seconds.items()
    ]
    blocks = _blocks(arguments, ["all requests", "seconds", "samples a second"], rows)
    loads = [[f"{rate:.2f}", f"{p50:.2f}", f"{p99:.2f}"] for rate, p50, p99 in facts.latencies]
    header = ["requests a second", "p50, seconds", "p99, seconds"]
    statuses = ", ".join(f"{n} of status {status}" for status, n in facts.statuses.items())
    blocks["table"] += (
        f"\n\n{markdown_table(header, loads)}\n\n"
        f"Of {facts.requests} mixed requests ({facts.samples} samples, {facts.rows} rows), "
        f"{facts.equal} have the bits that they get alone; {facts.used:.0%} of the rows were used. "
        f"Bad requests: {statuses}; a good request among them "
        f"{'kept' if facts.unchanged else 'lost'} its bits."
    )
    return {"blocks": blocks, "serving": facts._asdict()}


def folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the start of training on a large and a small folder, and return facts for JSON."""
    from benchmarks.folder_start import measure_starts

    with TemporaryDirectory() as temporary:
        starts = measure_starts(Path(temporary), (100, arguments.images), arguments.repeats)
    rows = [[f"{value:,.5g}" if value < 1000 else f"{value:,.0f}" for value in x] for x in starts]
    header = ["images", "seconds", "seconds of processors", "memory, MB"]
    return {
        "blocks": _blocks(arguments, header, rows),
        "starts": [start._asdict() for start in starts],
    }


def _comparison_facts(
    arguments: argparse.Namespace,
    comparisons: Sequence[Comparison],
    names: tuple[str, str, str] = SIDES,
    is_target: bool = True,
) -> dict[str, Any]:
    """The table of comparisons, and their numbers; `names` are columns of both sides and of the
    bound, which is a target or another ratio.
    """
    interval = f"{coverage(arguments.pairs):.0%} interval"
    header = ["work", names[0], names[1], "ratio", interval, names[2]]
    rows = [[*each.cells, *([each.verdict] if is_target else [])] for each in comparisons]
    facts = [each.to_json() for each in comparisons]
    if not is_target:
        facts = [each | {"verdict": "", "bound": None} for each in facts]
    return {
        "blocks": _blocks(arguments, [*header, *(["target"] if is_target else [])], rows),
        "comparisons": facts,
    }


def _blocks(
    arguments: argparse.Namespace, header: Sequence[str], rows: Iterable[Sequence[str]]
) -> dict[str, str]:
    """The table under the line that names the command and the machine."""
    return {"table": f"{_introduction(arguments)}\n\n{markdown_table(header, rows)}"}


def _introduction(arguments: argparse.Namespace) -> str:
    return f"`{_command()}`: {_describe_machine(arguments.threads)}"


def _command() -> str:
    """The command without the files that it writes."""
    words = ["python", "scripts/benchmark.py", *sys.argv[1:]]
    for option in ("--out", "--picture"):
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    return shlex.join(words)


def _describe_machine(threads: int) -> str:
    """Threads, processor or accelerator, and versions."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    name = "1 thread" if threads == 1 else f"{threads} threads"
    return ", ".join([name, str(device or _processor()), *versions])


def _processor() -> str:
    """Name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
