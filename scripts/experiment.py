"""`python scripts/experiment.py training|inversion|samplers`: the studies of docs/experiments."""

import argparse
from pathlib import Path

import torch


def main() -> None:
    """Measure, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    _add_training(commands.add_parser("training", help="schedule, weight and objective; continues what --out holds"))
    _add_inversion(commands.add_parser("inversion", help="round trips of a network trained for it, and of an oracle"))
    _add_samplers(commands.add_parser("samplers", help="samplers on a network trained for it, under guidance"))
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1, help="of the processor")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.measure(arguments)


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    command.add_argument(
        "--out", type=Path, default=Path("docs/experiments/training.jsonl"), help="a line of JSON a run"
    )
    command.set_defaults(measure=_training)


def _training(arguments: argparse.Namespace) -> None:
    from diffcore.evaluation.study import rows, study, table

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for row in study(arguments.out, arguments.seeds):
        print(row, flush=True)
    for place, to in enumerate(("training", "held-out")):
        print(f"\nFréchet distance to the {to} scans\n\n{table(rows(arguments.out), place)}")


def _add_inversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, default=400, help="of training, batch 64")
    command.add_argument("--images", type=int, default=32, help="that go there and back")
    command.set_defaults(measure=_inversion)


def _inversion(arguments: argparse.Namespace) -> None:
    from diffcore.evaluation.round_trip import report, trained

    print(report(trained(arguments.steps), arguments.images))


def _add_samplers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, default=400, help="of training, batch 64")
    command.add_argument("--seeds", type=int, default=60, help="samples of each measurement")
    command.set_defaults(measure=_samplers)


def _samplers(arguments: argparse.Namespace) -> None:
    from diffcore.evaluation.on_network import table
    from diffcore.evaluation.round_trip import trained

    print(table(trained(arguments.steps), arguments.seeds))


if __name__ == "__main__":
    main()
