"""Help and version: quick, and each option is described."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffcore.cli.main import COMMANDS
from diffcore.training.trainer import Trainer

HEAVY = {"torch", "diffusers", "numpy", "accelerate", "transformers", "jsonargparse", "matplotlib"}


def imported(*arguments):
    """The top-level packages that a command imports, and its output."""
    argv = [sys.executable, "-X", "importtime", "-m", "diffcore", *arguments]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}, ended.stdout


@pytest.mark.parametrize(("option", "text"), [("--help", "COMMAND"), ("--version", "diffcore 0.")])
def test_help_and_version_import_no_large_package(option, text):
    packages, output = imported(option)
    assert text in output
    assert "diffcore" in packages
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("plot", "schedules", "Cosine", "--out"),
        ("sample", "--help"),
        ("export", "--help"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_import_neither_diffusers_nor_transformers_until_they_need_them(
    arguments, tmp_path
):
    out = (tmp_path / "plot.png",) if arguments[-1] == "--out" else ()
    packages, _ = imported(*arguments, *out)
    assert "torch" in packages
    assert not packages & {"accelerate", "diffusers", "transformers"}


def test_help_names_every_command(diffcore):
    assert all(f"  {name} " in diffcore("--help").out for name in COMMANDS)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "train",
            (
                "--config",
                "--network",
                "--data",
                "--process.schedule",
                "--objective.weight",
                "--lr.peak",
                "--resume",
            ),
        ),
        (
            "sample",
            (
                "RUN",
                "--labels",
                "--per_label",
                "--seeds",
                "--sampler",
                "--grid",
                "--guidance",
                "--out",
            ),
        ),
        ("plot", ("schedules", "--out")),
        ("info", ("RUN",)),
    ],
)
def test_each_commands_help_names_its_options(diffcore, command, options):
    ended = diffcore(command, "--help")
    assert ended.status == 0
    assert ended.err == ""
    assert all(option in ended.out for option in options)
    assert len(ended.out.splitlines()) < 330  # the hundreds of modules of torch are not listed


def test_every_field_of_the_trainer_has_help(diffcore):
    out = " ".join(diffcore("train", "--help").out.split())
    for name in Trainer.__dataclass_fields__.keys() - {"config"}:
        assert f"--{name}" in out, name


def test_the_scripts_call_the_same_commands(monkeypatch):
    calls = []
    monkeypatch.setattr("diffcore.cli.main.main", lambda argv: calls.append(argv) or 0)
    for name in ("train", "sample"):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "a", "--b"])
        code = (Path(__file__).parents[2] / "scripts" / f"{name}.py").read_text()
        with pytest.raises(SystemExit, match="0"):
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert calls == [["train", "a", "--b"], ["sample", "a", "--b"]]


def test_help_prints_components_as_constructor_calls(diffcore):
    out = " ".join(diffcore("sample", "--help").out.split())
    assert "(type: Guidance, default: CFG(scale=1.0, reference=Unconditional()))" in out
    assert "class_path" not in out
    assert "default: Unset" not in diffcore("export", "--help").out
