"""`python scripts/experiment.py NAME`: run a study of docs/experiments, or draw its pictures."""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

PICTURES = Path("docs/pictures")


def main() -> None:
    """Run the study that the first word names, and print its tables."""
    parser = argparse.ArgumentParser(
        description="Run a study of docs/experiments and print its tables. Studies with --out "
        "continue the measurements that the file contains.",
        allow_abbrev=False,
    )
    studies = parser.add_subparsers(required=True, metavar="NAME")
    for run, text in {
        training: "distance of digits over steps, by schedule, loss weight and objective",
        guidance: "digits by guidance rule and scale w",
        inversion: "errors of inverted images, on a network trained for it and on an oracle",
        samplers: "distance to the exact flow of a network trained for it, with guidance",
        identification: "the process of trained networks, by their denoising error",
        variance: "variance of the loss with independent levels over that with stratified levels",
        zero_terminal_snr: "mean brightness of samples with and without zero terminal SNR",
        conditions: "whether samples obey their conditions, on problems with a known answer",
        mean_velocity: "error of MeanFlow's mean velocity over the steps of its training",
        flow_maps: "few-step networks beside the denoiser that they are distilled from",
        learned_variance: "DDPM in few steps on digits with fixed and with learned variances",
        learned_levels: "the bound of digits with one level for all pixels and with learned ones",
        learned_encoder: "the bound of digits without and with a learned encoder of x_0",
        claims: "what papers claim, measured: the tables of docs/claims.md",
        few_step: "distance of digits from students of one to four steps, and pictures of them",
        reward: "a student of the digits that is tuned by a reward, at several strengths",
        tuning: "how much closer tuned knots are, beside untuned ones and diffusers",
        default_sampler: "samplers and grids in the median and the tail, guided or not",
        caches: "error of samples over the work that caches save, on two networks of digits",
        kill_drill: "whether a run that is killed again and again ends with the same bytes",
    }.items():
        name = run.__name__.replace("_", "-")
        study = studies.add_parser(name, help=text, description=text)
        study.set_defaults(run=run, out=None)
        _add_options(study, run, name)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.run(arguments)


def _add_options(study: argparse.ArgumentParser, run: Callable[..., None], name: str) -> None:
    """Add the options of one study."""
    bounds = (learned_variance, learned_levels, learned_encoder)
    steps = dict.fromkeys((inversion, samplers, identification, *bounds), 400) | {
        conditions: 1000,
        flow_maps: 300,
        mean_velocity: 160,
        reward: 24,
    }
    with_seeds = (training, guidance, zero_terminal_snr, flow_maps, *bounds)
    study.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    if run in steps:
        help_text = f"training steps (default {steps[run]})"
        study.add_argument("--steps", type=int, default=steps[run], help=help_text)
    if run in (*with_seeds, claims):
        study.add_argument(
            "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)"
        )
    if run in (*with_seeds, mean_velocity, reward, few_step, tuning, default_sampler):
        out = Path(f"docs/experiments/{name}.jsonl")
        study.add_argument("--out", type=Path, default=out, help=f"measurements (default {out})")
    if run in (conditions, tuning, default_sampler, mean_velocity):
        study.add_argument("--only", nargs="+", help="names of problems (default: all)")
    if run in (inversion, samplers):
        count = 32 if run is inversion else 60
        help_text = f"images of each measurement (default {count})"
        study.add_argument("--count", type=int, default=count, help=help_text)
    if run in (tuning, default_sampler):
        help_text = "folder of a run of the digits recipe (default runs/digits)"
        study.add_argument("--run-folder", type=Path, default=Path("runs/digits"), help=help_text)
    _add_own_options(study, run)


def _add_own_options(study: argparse.ArgumentParser, run: Callable[..., None]) -> None:
    """Add the options that no other study has."""
    if run is flow_maps:
        study.add_argument(
            "--sizes", type=int, nargs="+", default=[2, 64], help="dimensions (default 2 64)"
        )
    if run is caches:
        _add_caches_options(study)
    if run is kill_drill:
        _add_drill_options(study)
    if run is reward:
        _add_reward_options(study)
    if run is few_step:
        _add_few_step_options(study)
    if run is claims:
        _add_claims_options(study)


def _add_caches_options(study: argparse.ArgumentParser) -> None:
    study.add_argument("--unet", type=Path, required=True, help="run of a U-Net")
    study.add_argument("--dit", type=Path, required=True, help="run of a transformer")
    study.add_argument("--count", type=int, default=40, help="samples (default 40)")
    study.add_argument("--steps", type=int, default=24, help="sampler steps (default 24)")
    out = Path("docs/experiments/caches.json")
    study.add_argument("--out", type=Path, default=out, help=f"measurements (default {out})")


def _add_reward_options(study: argparse.ArgumentParser) -> None:
    reference, folder = Path("runs/few-step/Consistency-0"), Path("runs/few-step")
    study.add_argument("--reference", type=Path, default=reference, help=f"({reference})")
    study.add_argument("--folder", type=Path, default=folder, help=f"({folder})")


def _add_few_step_options(study: argparse.ArgumentParser) -> None:
    study.add_argument("--only", nargs="+", help="names of methods (default: all)")
    study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    for name, folder in (("teacher", "runs/digits"), ("folder", "runs/few-step")):
        study.add_argument(f"--{name}", type=Path, default=Path(folder), help=f"({folder})")


def _add_drill_options(study: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("kills", 20, "number of SIGKILLs"),
        ("terms", 10, "number of SIGTERMs"),
        ("steps", 200, "optimizer steps of the run"),
        ("ranks", 1, "processes that train together"),
        ("seed", 0, "seed of the moments"),
    ):
        study.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    study.add_argument("--folder", type=Path, help="folder of the runs (default: a temporary one)")


def _add_claims_options(study: argparse.ArgumentParser) -> None:
    study.add_argument("--only", nargs="+", help="names of studies (default: all)")
    study.add_argument(
        "--folder",
        type=Path,
        default=Path("docs/experiments"),
        help="folder of the measurements claims-NAME.jsonl (default docs/experiments)",
    )


def _measure(lines: Iterable[str], out: Path) -> list[dict[str, Any]]:
    """Print the lines that a study appends to its file, and return all measurements of the file."""
    from experiments.study import read_measurements

    for line in lines:
        print(line, flush=True)
    return read_measurements(out)


def training(arguments: argparse.Namespace) -> None:
    """Run the study of schedules, weights and objectives."""
    from experiments.training import draw, format_table, run_study

    measurements = _measure(run_study(arguments.out, arguments.seeds), arguments.out)
    draw(measurements, PICTURES / "training.png")
    for index, scans in enumerate(("training", "held-out")):
        table = format_table(measurements, index)
        print(f"\nFréchet distance to the {scans} scans\n\n{table}")


def guidance(arguments: argparse.Namespace) -> None:
    """Run the study of guidance rules over w."""
    from experiments import guidance as study

    measurements = _measure(study.run_study(arguments.out, arguments.seeds), arguments.out)
    for quantity, title, digits in study.TABLES:
        print(f"\n{title}\n\n{study.format_table(measurements, quantity, digits)}")
    print(f"\nEvaluations that AdaptiveGuidance saves\n\n{study.format_savings(measurements)}")
    study.draw(measurements, PICTURES)


def inversion(arguments: argparse.Namespace) -> None:
    """Measure the errors of inverted images."""
    from experiments.inversion import format_report, train_denoiser

    print(format_report(train_denoiser(arguments.steps), arguments.count))


def samplers(arguments: argparse.Namespace) -> None:
    """Measure samplers on a trained network, with and without guidance."""
    from benchmarks.network_accuracy import measure_table
    from experiments.inversion import train_denoiser

    print(measure_table(train_denoiser(arguments.steps), arguments.count))


def identification(arguments: argparse.Namespace) -> None:
    """Find the processes of trained networks."""
    from experiments.identification import measure_table

    print(measure_table(arguments.steps))


def variance(arguments: argparse.Namespace) -> None:
    """Measure the variance of the loss for each schedule."""
    from benchmarks.loss_variance import measure_table

    print(measure_table())


def zero_terminal_snr(arguments: argparse.Namespace) -> None:
    """Run the study of mean brightness."""
    from experiments import zero_terminal_snr as study

    measurements = _measure(study.run_study(arguments.out, arguments.seeds), arguments.out)
    print(f"\n{study.format_table([study.measure_data(), *measurements])}")
    study.draw(measurements, PICTURES / "zero-terminal-snr.png")


def _chosen(names: list[str] | None, known: Iterable[str]) -> list[str]:
    """The names that --only gives, or all of them; one line for an unknown name."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise SystemExit(f"--only has {name!r}, expected some of {', '.join(known)}")
    return names or known


def conditions(arguments: argparse.Namespace) -> None:
    """Train, sample and guide by named conditions."""
    from experiments.conditions import PROBLEMS, format_table, run_study

    names = _chosen(arguments.only, PROBLEMS)
    measurements = []
    for row in run_study(names, arguments.steps):
        print(row, flush=True)
        measurements.append(row)
    print(f"\n{format_table(measurements)}")


def learned_variance(arguments: argparse.Namespace) -> None:
    """Run the study of DDPM's variances."""
    from experiments.learned import variance as study

    lines = study.run_study(arguments.out, arguments.seeds, arguments.steps)
    rows = _measure(lines, arguments.out)
    measurements = [row for row in rows if row["steps"] == arguments.steps]
    for quantity, title in study.TABLES.items():
        print(f"\n{title}\n\n{study.format_table(measurements, quantity)}")


def learned_levels(arguments: argparse.Namespace) -> None:
    """Run the study of the learned levels of pixels."""
    from experiments.learned import levels

    _print_bounds(arguments, levels)


def learned_encoder(arguments: argparse.Namespace) -> None:
    """Run the study of learned encoders of x_0."""
    from experiments.learned import encoder

    _print_bounds(arguments, encoder)


def _print_bounds(arguments: argparse.Namespace, study: Any) -> None:
    """Run a study of bounds, and print a table for each number of steps."""
    lines = study.run_study(arguments.out, arguments.seeds, arguments.steps)
    rows = _measure(lines, arguments.out)
    measurements = [row for row in rows if row["steps"] == arguments.steps]
    for count in study.COUNTS:
        print(f"\nBits per dimension, {count} steps\n\n{study.format_table(measurements, count)}")


def flow_maps(arguments: argparse.Namespace) -> None:
    """Train and measure few-step networks on mixtures of Gaussians."""
    from experiments.students import flow_maps as study

    settings = (arguments.seeds, arguments.steps, arguments.sizes)
    lines = study.run_study(arguments.out, *settings)
    rows = [row for row in _measure(lines, arguments.out) if row["steps"] == arguments.steps]
    for size in arguments.sizes:
        print(f"\n{size} dimensions\n\n{study.format_table(rows, size)}")


def mean_velocity(arguments: argparse.Namespace) -> None:
    """Train MeanFlow by an exact teacher and measure its mean velocity."""
    from experiments.students import mean_velocity as study

    lines = study.run_study(arguments.out, arguments.steps, arguments.only)
    print(f"\n{study.format_table(_measure(lines, arguments.out))}")


def claims(arguments: argparse.Namespace) -> None:
    """Run the studies of what papers claim."""
    from experiments.claims.report import REPORTS, TRAINING_PAIRS, format_speed_ups
    from experiments.claims.studies import STUDIES
    from experiments.study import read_measurements

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in _chosen(arguments.only, STUDIES):
        out = arguments.folder / f"claims-{name}.jsonl"
        rows = _measure(STUDIES[name](out, arguments.seeds), out)
        print(f"\n{name}\n\n{REPORTS[name](rows)}\n")
    measurements = read_measurements(Path("docs/experiments/training.jsonl"))
    print(f"training.jsonl\n\n{format_speed_ups(measurements, TRAINING_PAIRS, 400)}")


def tuning(arguments: argparse.Namespace) -> None:
    """Run the study of tuned knots."""
    from experiments import tuning as study

    names = _chosen(arguments.only, study.SCALES)
    measurements = _measure(
        study.run_study(arguments.out, arguments.run_folder, names), arguments.out
    )
    print(f"\n{study.format_table(measurements)}")
    study.draw(measurements, PICTURES / "tuning.png")


def default_sampler(arguments: argparse.Namespace) -> None:
    """Run the study of candidates for the default sampler and grid."""
    from experiments import default_sampler as study

    names = _chosen(arguments.only, study.SCALES)
    rows = _measure(study.run_study(arguments.out, arguments.run_folder, names), arguments.out)
    measurements = [row for row in rows if row["problem"] in names]
    for text, rows in study.group_problems(measurements).items():
        print(f"\n{text}\n\n{study.format_table(rows)}")


def caches(arguments: argparse.Namespace) -> None:
    """Measure the error of caches over the work that they save."""
    from experiments.caches import draw_errors, format_rows, measure_caches
    from pictures.themes import draw_themes

    rows = measure_caches(
        {"U-Net": arguments.unet, "DiT": arguments.dit}, arguments.count, arguments.steps
    )
    arguments.out.write_text(
        json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8"
    )
    draw_themes(partial(draw_errors, rows), PICTURES / "caches.png")
    print(format_rows(rows))


def few_step(arguments: argparse.Namespace) -> None:
    """Run the study of students of few steps."""
    from experiments.students import few_step as study

    names = _chosen(arguments.only, study.METHODS)
    study.measure(arguments.teacher, arguments.folder, arguments.out, names, arguments.seeds)
    print(f"\n{study.table(arguments.out)}")
    study.draw(arguments.teacher, arguments.folder, PICTURES / "few-step.png", names)


def reward(arguments: argparse.Namespace) -> None:
    """Run the study of reward tuning."""
    from experiments.students import reward as study

    settings = (arguments.reference, arguments.folder, arguments.out, arguments.steps)
    rows = _measure(study.run_study(*settings), arguments.out)
    print(f"\n{study.format_table(rows)}")


def kill_drill(arguments: argparse.Namespace) -> None:
    """Kill a run of the recipe digits at random moments, and compare it with an undisturbed one."""
    from tempfile import TemporaryDirectory

    from experiments import kill_drill as study

    with TemporaryDirectory() as temporary:
        options = study.digits_options(arguments.steps)
        folder = arguments.folder or Path(temporary)
        drill = study.Drill(folder, options, arguments.ranks, arguments.threads)
        counts = (arguments.kills, arguments.terms, arguments.steps)
        faults = study.plan_faults(*counts, arguments.ranks, arguments.seed)
        result = study.run_drill(drill, faults, lambda line: print(line, flush=True))
        print(f"\n{study.format_report(*result)}")


if __name__ == "__main__":
    main()
