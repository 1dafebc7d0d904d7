"""Help and version: quick, and each option is described."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffcore.cli.main import COMMANDS
from diffcore.training.trainer import Trainer

HEAVY = {"torch", "diffusers", "numpy", "accelerate", "transformers", "jsonargparse", "matplotlib"}


IN_TURN = """
import json, sys
from diffcore.cli.main import main
for argv in json.loads(sys.argv[1]):
    try:
        status = main(argv)
    except SystemExit as ended:
        status = ended.code
    assert not status, argv
"""


def imported(*arguments):
    """The top-level packages that an interpreter with these arguments imports, and its output."""
    argv = [sys.executable, "-X", "importtime", *arguments]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}, ended.stdout


@pytest.mark.parametrize(("option", "text"), [("--help", "COMMAND"), ("--version", "diffcore 0.")])
def test_help_and_version_import_no_large_package(option, text):
    packages, output = imported("-m", "diffcore", option)
    assert text in output
    assert "diffcore" in packages
    assert not packages & HEAVY


def test_commands_import_neither_diffusers_nor_transformers_until_they_need_them(tmp_path):
    plot = ["plot", "schedules", "Cosine", f"--out={tmp_path / 'plot.png'}"]
    commands = [["info"], plot, ["sample", "--help"], ["export", "--help"]]
    packages, output = imported("-c", IN_TURN, json.dumps(commands))
    assert "RUN" in output
    assert (tmp_path / "plot.png").is_file()
    assert "torch" in packages
    assert not packages & {"accelerate", "diffusers", "transformers"}


def test_help_names_every_command(diffcore):
    out = diffcore("--help").out
    assert all(re.search(rf"^    {name}\s", out, re.MULTILINE) for name in COMMANDS)


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
                "--objective",
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
    assert len(ended.out.splitlines()) < 500  # the hundreds of modules of torch are not listed


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
    assert "(type: Guidance, default: CFG(scale=1.0, reference=Unconditional()), one of: " in out
    assert "class_path" not in out
    assert "default: Unset" not in diffcore("export", "--help").out


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("sample", "--sampler", ("DDIM", "UniPC", "Restart")),
        ("sample", "--guidance", ("CFG", "APG", "Interval")),
        ("train", "--process.schedule", ("Cosine", "Laplace", "Shifted")),
        ("train", "--data", ("Digits", "ImageFolder")),
    ],
)
def test_help_lists_the_classes_of_a_component(diffcore, command, option, names):
    out = " ".join(diffcore(command, "--help").out.split())
    entry = out[out.index(f" {option} {option.rpartition('.')[2].strip('-').upper()}") :]
    listed = entry[entry.index("one of: ") :].partition(")")[0]
    assert all(name in listed for name in names)
    assert "UNet2DModel" in out or command == "sample"
    ended = diffcore(command, f"{option}.help")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"Classes of {option}; {option}.help CLASS describes")
    assert set(names) <= {line.split()[0] for line in lines[1:]}
    assert all(len(line) <= 100 and len(line.split()) > 2 for line in lines)


def test_help_shows_no_internal_types(diffcore):
    for command in ("train", "sample", "export"):
        out = diffcore(command, "--help").out
        assert not re.search(r"Unvalidated|InitVar|<class|Optional\[", out)


def test_every_option_that_a_message_names_exists(diffcore):
    helps = {name: diffcore(name, "--help").out for name in COMMANDS}
    helps["plot"] += "".join(
        diffcore("plot", what, "--help").out for what in ("schedules", "weights")
    )
    helps["doctor"] += diffcore("doctor", ".", "--help").out
    helps["train"] += diffcore("train", "--objective.help", "Objective").out
    options = re.findall(r"--([\w.-]*\w)", "".join(helps.values()))
    known = {option.replace("-", "_") for option in options}
    known |= {"help", "trust", "version"}  # of all commands
    known |= {
        "multi_gpu",
        "mixed_precision",
        "dynamo_backend",
        "use_deepspeed",
    }  # of accelerate launch
    known |= {"data.folder", "data.size", "data.text"}  # of the class of the data
    word = {f"network.word.{name}" for name in ("word", "initial")}
    known |= {"network.text_lora.rank"} | word  # of the class of the network
    teacher = {f"objective.teacher.{name}" for name in ("folder", "pipeline")}
    known |= {"objective.teacher"} | teacher  # of the class of the objective
    known |= {"shm_size"}  # of docker
    root = Path(__file__).parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "diffcore", "schedules", "samplers", "guidance"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    unknown = {
        f"{name}: --{option}"
        for name in listed
        if name.endswith(".py")
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for option in re.findall(r"(?<!var\()(?<![\w-])--([a-z][\w.-]*\w)", node.value)
        if option.replace("-", "_") not in known
    }
    assert unknown == set()
