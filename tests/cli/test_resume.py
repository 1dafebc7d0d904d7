"""`diffcore train --resume` on runs that were moved, edited or damaged, and on new folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffcore.run import Run
from tests.conftest import forget_accelerate
from tests.helpers.file_faults import full_disk
from tests.helpers.training_runs import hashes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(diffcore, trained):
    """The folder `run`, a copy of the tiny run under the name that its config.yaml has."""
    shutil.copytree(trained, "run")
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace(str(trained), "run"))
    return Run("run")


@pytest.fixture
def train(diffcore):
    """Run `diffcore train`, several times in one process."""

    def command(*words):
        forget_accelerate()
        return diffcore("train", *words)

    return command


def edit_config(run, **changes):
    settings = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump(settings | changes))


def test_one_command_with_resume_auto_starts_a_run_and_continues_it(train, tiny):
    command = ("digits", *tiny, "--folder=new", "--save-every=2", "--log-every=1", "--resume=auto")
    assert train(*command, "--steps=2").status == 0
    ended = train(*command, "--steps=4")
    assert ended.status == 0, ended.err
    assert "resumed at step 2" in ended.err
    assert train("digits", *tiny, "--folder=once", "--steps=4", "--log-every=1").status == 0
    for name in ("ema.safetensors", "metrics.jsonl", "process.json"):
        assert Path("new", name).read_bytes() == Path("once", name).read_bytes()
    assert yaml.safe_load(Path("new/config.yaml").read_text())["resume"] is False


def test_a_config_that_was_edited_is_refused_with_the_edited_settings(train, run):
    edit_config(run, seed=3, clip=2.0)
    before = hashes(run.folder)
    ended = train("--config=run/config.yaml", "--resume=true")
    assert ended.status == 1
    assert "started with another clip (1.0, now 2.0), seed (0, now 3): set the first" in ended.err
    assert hashes(run.folder) == before
    remedy = ("--init=run", "--folder=new", "--steps=1")
    ended = train("--config=run/config.yaml", *remedy)
    assert ended.status == 0, ended.err
    ended = train("--config=run/config.yaml", "--resume=true", "--seed=0", "--clip=1.0")
    assert ended.status == 0, ended.err


def test_a_run_that_was_moved_is_resumed_where_its_config_lies(train, run):
    before = hashes(run.folder)
    Path("elsewhere").mkdir()
    run.folder.rename("elsewhere/moved")
    ended = train("--config", "elsewhere/moved/config.yaml", "--resume=true", "--steps=4")
    assert ended.status == 0, ended.err
    assert not run.folder.exists()
    after = hashes(Path("elsewhere/moved"))
    assert {name for name in before if before[name] != after[name]} == {"config.yaml"}
    settings = yaml.safe_load(Path("elsewhere/moved/config.yaml").read_text())
    assert settings["folder"] == "elsewhere/moved"
    ended = train("elsewhere/moved/config.yaml")
    assert "elsewhere/moved holds a run already" in ended.err
    ended = train("elsewhere/moved/config.yaml", "--folder=run", "--resume=true")
    assert "run holds no run to resume: begin it with --resume auto, or name the" in ended.err


def test_a_full_disk_ends_the_run_with_one_line_and_the_run_continues(train, run):
    with full_disk(20_000):
        ended = train("--config=run/config.yaml", "--resume=true", "--steps=6")
    assert ended.status == 1
    line = ended.err.splitlines()[-1]
    assert "diffcore train: error: run/checkpoints/step-00000006 cannot be written (" in line
    assert "an older one of this name is kept" in line
    assert "(whole checkpoints: step-00000002, step-00000004)" in line
    ended = train("--config=run/config.yaml", "--resume=true", "--steps=6")
    assert ended.status == 0, ended.err
    assert "resumed at step 4" in ended.err


def flip_byte(path):
    content = bytearray(path.read_bytes())
    index = content.index(b"0.75") if path.suffix == ".json" else -9
    content[index] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("sample", "run", "--labels=1", "--steps=2"), "run/ema.safetensors"),
        (("sample", "run", "--labels=1", "--steps=2"), "run/process.json"),
        (
            ("sample", "run/pipeline", "--labels=1", "--steps=2"),
            "run/pipeline/unet/diffusion_pytorch_model.safetensors",
        ),
        (
            ("export", "run", "--out=new"),
            "run/pipeline/unet/diffusion_pytorch_model.safetensors",
        ),
        (("export", "run", "--out=new"), "run/pipeline/scheduler/scheduler_config.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_flipped_byte_is_named_and_mended_on_resume(diffcore, train, run, command, file):
    path, before = Path(file), hashes(run.folder)
    flip_byte(path)
    ended = diffcore(*command)
    assert ended.status == 1
    assert f"{path} is not what was written" in ended.err or f"{path} is not a proc" in ended.err
    assert "resume" in ended.err
    assert train("--config=run/config.yaml", "--resume=true").status == 0
    assert hashes(run.folder) == before
    assert diffcore(*command).status == 0


@pytest.mark.slow
def test_the_config_of_a_run_is_read_as_utf8_in_a_locale_of_ascii(run):
    run.config.write_text(run.config.read_text() + "# λ\n", encoding="utf-8")
    script = (
        "from diffcore.cli.main import main; from diffcore.run import Run\n"
        "assert 'network' in Run('run').settings()\n"
        "main(['train', 'run/config.yaml', '--steps=0'])"
    )
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "steps is 0, expected at least 1" in done.stderr
