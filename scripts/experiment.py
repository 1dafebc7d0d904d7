"""`python scripts/experiment.py NAME`: the studies of docs/experiments, and the pictures of docs/guidance.md (`fields`)."""

import argparse
from pathlib import Path

import torch

PICTURES = Path("docs/pictures")


def main() -> None:
    """Measure, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for measure, text in {
        training: "schedule, weight and objective, on the digits; continues what --out holds",
        guidance: "rules over w, on the digits; continues what --out holds",
        inversion: "round trips of a network trained for it, and of an oracle",
        samplers: "on a network trained for it, under guidance",
        variance: "of a batch's loss, with independent levels over with stratified ones",
        zero_terminal_snr: "mean brightness of samples with and without it; continues what --out holds",
        fields: "guided fields and samples of a mixture in two dimensions",
    }.items():
        name = measure.__name__.replace("_", "-")
        command = commands.add_parser(name, help=text)
        command.set_defaults(measure=measure, out=None)
        command.add_argument("--threads", type=int, default=1, help="of the processor")
        if measure in (training, guidance, zero_terminal_snr):
            command.add_argument(
                "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs"
            )
            command.add_argument("--out", type=Path, default=Path(f"docs/experiments/{name}.jsonl"))
        if measure in (inversion, samplers):
            command.add_argument("--steps", type=int, default=400, help="of training, batch 64")
            command.add_argument(
                "--count",
                type=int,
                default=32 if measure is inversion else 60,
                help="images of each measurement",
            )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.measure(arguments)


def training(arguments: argparse.Namespace) -> None:
    """Tables and curves of schedules, weights and objectives."""
    from experiments.training import picture, rows, study, table

    for row in study(arguments.out, arguments.seeds):
        print(row, flush=True)
    picture(rows(arguments.out), arguments.out.with_suffix(".png"))
    for place, to in enumerate(("training", "held-out")):
        print(f"\nFréchet distance to the {to} scans\n\n{table(rows(arguments.out), place)}")


def guidance(arguments: argparse.Namespace) -> None:
    """Tables and pictures of guidance rules over w."""
    from experiments import guidance as guidance_study
    from experiments.training import rows

    for row in guidance_study.study(arguments.out, arguments.seeds):
        print(row, flush=True)
    measured = rows(arguments.out)
    for what, title, digits in guidance_study.TABLES:
        print(f"\n{title}\n\n{guidance_study.table(measured, what, digits)}")
    print(f"\nEvaluations that AdaptiveGuidance saves\n\n{guidance_study.savings(measured)}")
    guidance_study.draw(measured, PICTURES)


def inversion(arguments: argparse.Namespace) -> None:
    """Errors there and back."""
    from experiments.inversion import report, trained

    print(report(trained(arguments.steps), arguments.count))


def samplers(arguments: argparse.Namespace) -> None:
    """Distance to the exact flow of a network, with and without guidance."""
    from benchmarks.network_accuracy import table
    from experiments.inversion import trained

    print(table(trained(arguments.steps), arguments.count))


def variance(arguments: argparse.Namespace) -> None:
    """A row a schedule."""
    from benchmarks.loss_variance import rows

    for row in rows():
        print(row, flush=True)


def zero_terminal_snr(arguments: argparse.Namespace) -> None:
    """Table and histograms of mean brightness."""
    from experiments import zero_terminal_snr as brightness_study
    from experiments.training import rows

    for row in brightness_study.study(arguments.out, arguments.seeds):
        print(row, flush=True)
    measured = rows(arguments.out)
    print(f"\n{brightness_study.table([brightness_study.real(), *measured])}")
    brightness_study.draw(measured, PICTURES / "zero-terminal-snr.png")


def fields(arguments: argparse.Namespace) -> None:
    """The pictures of docs/guidance.md."""
    from experiments.guidance_fields import draw_fields, draw_samples

    draw_fields(PICTURES)
    draw_samples(PICTURES)


if __name__ == "__main__":
    main()
