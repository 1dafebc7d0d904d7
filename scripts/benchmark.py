"""`python scripts/benchmark.py overhead|steps|pipeline|guidance|accuracy`: the tables of docs/benchmarks.md."""

import argparse
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from benchmarks.training_speed import Comparison, coverage, intervals, overhead


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}\n")


def main() -> None:
    """Measure, print the tables and the command that made them; a slow ratio or a wide error is a result and no error."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_overhead(
        commands.add_parser(
            "overhead", help="digits network, training and sampling, beside bare PyTorch"
        )
    )
    _add_steps(
        commands.add_parser(
            "steps", help="50 steps with a network that does nothing, beside diffusers"
        )
    )
    _add_pipeline(
        commands.add_parser(
            "pipeline", help="a StableDiffusionPipeline with our scheduler, beside diffusers'"
        )
    )
    _add_guidance(
        commands.add_parser(
            "guidance", help="digits network, Interval against CFG over the same knots"
        )
    )
    _add_accuracy(
        commands.add_parser(
            "accuracy", help="distance to the exact flow by evaluations, beside diffusers"
        )
    )
    for command in commands.choices.values():
        command.add_argument(
            "--threads",
            type=int,
            default=torch.get_num_threads(),
            help="of the processor (default all)",
        )
        command.add_argument("--out", type=Path, help="JSON of every measurement")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"threads is {arguments.threads}, expected at least 1")
    torch.set_num_threads(arguments.threads)
    try:
        facts = arguments.measure(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.out:
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "where": _where(arguments.threads),
            **facts,
        }
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


def _where(threads: int) -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return f"{threads} threads, {device}, torch {torch.__version__}, {platform.machine()}"


def _add_overhead(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs", type=int, default=40, help="interleaved pairs, at least 30 (default 40)"
    )
    command.add_argument(
        "--steps", type=int, default=1, help="training steps of a measurement (default 1)"
    )
    command.add_argument(
        "--rows", type=int, default=64, help="samples of a measurement (default 64)"
    )
    command.set_defaults(
        measure=lambda a: _compared(
            a, overhead(a.pairs, a.steps, a.rows), ("ours, ms", "bare, ms", "at most")
        )
    )


def _add_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs", type=int, default=100, help="interleaved pairs, at least 30 (default 100)"
    )

    def measure(arguments: argparse.Namespace) -> dict[str, object]:
        from benchmarks.step_overhead import steps

        return _compared(
            arguments, steps(arguments.pairs), ("ours, ms", "diffusers, ms", "at most")
        )

    command.set_defaults(measure=measure)


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs", type=int, default=40, help="interleaved pairs, at least 30 (default 40)"
    )

    def measure(arguments: argparse.Namespace) -> dict[str, object]:
        from benchmarks.pipeline_overhead import pipelines

        warnings.simplefilter("ignore")  # diffusers' own
        return _compared(
            arguments, pipelines(arguments.pairs), ("ours, ms", "diffusers, ms", "at most")
        )

    command.set_defaults(measure=measure)


def _add_guidance(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pairs", type=int, default=40, help="interleaved pairs, at least 30 (default 40)"
    )
    command.add_argument(
        "--rows", type=int, default=64, help="samples of a measurement (default 64)"
    )
    heads = ("Interval, ms", "CFG, ms", "evaluations")
    command.set_defaults(measure=lambda a: _compared(a, intervals(a.pairs, a.rows), heads))


def _compared(
    arguments: argparse.Namespace, comparisons: Sequence[Comparison], heads: tuple[str, str, str]
) -> dict[str, object]:
    """Print the table of comparisons."""
    print(
        f"`{shlex.join(['python', *sys.argv])}`: {arguments.pairs} pairs, {_where(arguments.threads)}\n"
    )
    print(
        f"| | {heads[0]} | {heads[1]} | ratio | {coverage(arguments.pairs):.0%} interval | {heads[2]} |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(comparison.row() for comparison in comparisons))
    return {"comparisons": [found.facts() for found in comparisons]}


def _add_accuracy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--starts",
        type=int,
        default=128,
        help="starting points of each oracle, twice as many of the digits (default 128)",
    )
    command.add_argument(
        "--picture", type=Path, help="of the closest of each side over evaluations"
    )

    def measure(arguments: argparse.Namespace) -> dict[str, object]:
        from benchmarks import accuracy_report as report
        from benchmarks.accuracy import accuracy, ours
        from benchmarks.schedulers import theirs

        warnings.simplefilter("ignore")  # diffusers' own
        rows = list(accuracy({"ours": ours, "diffusers": theirs}, arguments.starts))
        default = report.default_name()
        print(
            f"`{shlex.join(['python', *sys.argv])}`: {arguments.starts} starts; default: {default}\n"
        )
        print(report.summary(rows, default, 2 * arguments.starts))
        for oracle in dict.fromkeys(row.oracle for row in rows):
            print(f"\n{oracle}\n\n{report.by_method(rows, oracle)}")
        print("\n| over our closest: geometric mean | most | |\n|---|---|---|")
        for mean, most, name in report.ranking(rows, 2 * arguments.starts)[:20]:
            print(f"| {mean:.2f} | {most:.2f} | {name} |")
        if arguments.picture:
            report.picture(rows, default, arguments.picture)
        return {"starts": arguments.starts, "default": default, "rows": [vars(row) for row in rows]}

    command.set_defaults(measure=measure)


if __name__ == "__main__":
    main()
