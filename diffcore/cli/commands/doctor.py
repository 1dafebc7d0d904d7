"""`diffcore doctor`: find faults of a training before it starts, or of a pipeline's config."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from jsonargparse import Namespace

from diffcore.cli.arguments import extract_option, wants_help
from diffcore.cli.training.recipes import recipe_names
from diffcore.cli.training.training_settings import build_trainer, parse_settings, training_parser
from diffcore.doctor.examination import examine_training
from diffcore.doctor.findings import (
    Finding,
    format_finding,
    has_wrong,
    summarize,
    write_findings,
)
from diffcore.io.parser import ComponentParser

__all__ = ["main"]

DESCRIPTION = (
    "Find faults of a training before it starts: of its data, settings, network, memory and time. "
    "SETTINGS are a recipe ({recipes}) or a YAML file with the options of `diffcore train`. With "
    "the FOLDER of a run or of a diffusers pipeline in their place: find the process that its "
    "network was trained on by its denoising error on images, and compare its config (`diffcore "
    "doctor FOLDER --help`). The exit status is 1 if something is wrong. Nothing is written "
    "without --out."
)
EPILOG = (
    "`--quick` leaves out what trains. `--out OUT` writes findings.json and effective-weight.png "
    "into the folder OUT."
)


def main(argv: Sequence[str]) -> None:
    """Print findings, one line each.

    Args:
        argv: command-line words after `doctor`.

    Raises:
        SystemExit: a finding is wrong (status 1).
    """
    is_recipe = bool(argv) and argv[0] in recipe_names()  # also beside a folder of its name
    if argv and not argv[0].startswith("-") and not is_recipe and Path(argv[0]).is_dir():
        from diffcore.cli.network_doctor import examine_folder

        findings = examine_folder(argv)
    else:
        findings = _examine_settings(argv)
    print(summarize(findings))
    if has_wrong(findings):
        raise SystemExit(1)


def _examine_settings(argv: Sequence[str]) -> list[Finding]:
    """Print the findings of a training's settings, each as soon as it is known."""
    outs, words = extract_option(argv, "out", "a folder")
    quick = "--quick" in words
    words = [word for word in words if word != "--quick"]
    parser = training_parser(
        "diffcore doctor", DESCRIPTION.format(recipes=", ".join(recipe_names()))
    )
    parser.usage = "diffcore doctor [SETTINGS | FOLDER] [--option value ...] [--quick] [--out OUT]"
    if wants_help(words):
        parser.epilog = f"{EPILOG} {parser.epilog}"
    settings = parse_settings(parser, words)
    findings = []
    for finding in _findings(parser, settings, quick):
        print(format_finding(finding), flush=True)
        findings.append(finding)
    if outs:
        _write(Path(outs[-1]), findings, parser.dump(settings))
    return findings


def _findings(parser: ComponentParser, settings: Namespace, quick: bool) -> Iterator[Finding]:
    skips = settings.get("data.init_args.unreadable") == "skip"
    if settings.get("data.init_args.unreadable"):
        settings["data.init_args.unreadable"] = "skip"  # they are findings, not the end
    settings["resume"] = False
    try:
        with redirect_stdout(sys.stderr):
            trainer = build_trainer(parser, settings)
    except ValueError as error:
        yield Finding("settings", "wrong", f"the training refuses to start: {error}")
        return
    yield Finding("settings", "ok", "the settings fit each other, and the first item fits them.")
    yield from examine_training(trainer, quick, skips)


def _write(folder: Path, findings: Sequence[Finding], settings: str) -> None:
    """Write the findings, and the figure of the effective weight if the settings are whole."""
    import yaml

    from diffcore.cli.commands.plot import TrainingLevels, draw_weights
    from diffcore.core.process import Process
    from diffcore.io.specs import from_spec
    from diffcore.objectives.objective import Objective

    write_findings(folder, findings)
    content = yaml.safe_load(settings)
    process = from_spec(Process, content["process"])
    levels = TrainingLevels("settings", process, from_spec(Objective, content["objective"]))
    figure = folder / "effective-weight.png"
    draw_weights([], [levels], "v_prediction", process.sigma_data, figure)
    print(f"findings and effective weight -> {folder}")
