"""`python scripts/benchmark.py overhead | guidance`: what the library costs beside bare PyTorch, and what guidance in an
interval saves, as tables for docs/benchmarks.md.
"""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import torch

from diffcore.evaluation.benchmark import coverage, intervals, overhead

HEADS = {"overhead": ("ours, ms", "bare, ms", "at most"), "guidance": ("Interval, ms", "CFG, ms", "evaluations")}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: error: {message}\n")


def main() -> None:
    """Measure, print the table and the command that made it; a slow ratio is a result and no error."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("overhead", help="digits network, training and sampling").add_argument(
        "--steps", type=int, default=1, help="training steps of a measurement (default 1)"
    )
    commands.add_parser("guidance", help="digits network, Interval against CFG over the same knots")
    for command in commands.choices.values():
        command.add_argument("--pairs", type=int, default=40, help="interleaved pairs, at least 30 (default 40)")
        command.add_argument("--rows", type=int, default=64, help="samples of a measurement (default 64)")
        command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor (all)")
        command.add_argument("--out", type=Path, help="JSON of every measurement")
    arguments = parser.parse_args()
    command = commands.choices[arguments.what]
    if arguments.threads < 1:
        command.error(f"threads is {arguments.threads}, expected at least 1")
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.what == "overhead":
            comparisons = overhead(arguments.pairs, arguments.steps, arguments.rows)
        else:
            comparisons = intervals(arguments.pairs, arguments.rows)
    except ValueError as error:
        command.error(str(error))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    where = f"{arguments.threads} threads, {device}, torch {torch.__version__}, {platform.machine()}"
    made_by = shlex.join(["python", *sys.argv])
    print(f"`{made_by}`: {arguments.pairs} pairs, {where}\n")
    first, second, last = HEADS[arguments.what]
    print(f"| | {first} | {second} | ratio | {coverage(arguments.pairs):.0%} interval | {last} |")
    print("|---|---|---|---|---|---|")
    print("\n".join(comparison.row() for comparison in comparisons))
    if arguments.out:
        facts = {"command": made_by, "where": where, "comparisons": [found.facts() for found in comparisons]}
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
