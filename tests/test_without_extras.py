"""What works with the core dependencies alone, and which extra the error names where
one is needed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from diffcore.core.process import Process
from diffcore.io.extras import EXTRAS
from diffcore.io.safetensors import write_weights
from diffcore.run import Run
from diffcore.schedules import Cosine

BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r})); "
COMMAND = BLOCKED + "from diffcore.cli.main import main; sys.exit(main(sys.argv[1:]))"
NETWORK = """
import torch
from torch import nn


class Shrink(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, time, label=None):
        return self.scale * x


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((1, 4, 4), index / 8.0)
"""


def python(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which no optional dependency can be imported."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with a module of a plain network, and a run of it."""
    (tmp_path / "plain.py").write_text(NETWORK)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    process = Process(Cosine(), "v_prediction", shape=(1, 4, 4))
    process.save(run.process)
    run.config.write_text(yaml.safe_dump({"network": {"class_path": "plain.Shrink"}}))
    network = nn.Module()
    network.scale = nn.Parameter(torch.tensor(0.5))
    write_weights(run.weights, network.state_dict())
    return tmp_path


def test_a_run_of_a_plain_network_is_sampled(folder):
    arguments = ("sample", "run", "--trust=plain", "--seeds=0-3", "--steps=4", "--out=x.png")
    ended = python(COMMAND, *arguments, folder=folder)
    assert ended.returncode == 0, ended.stderr
    assert (folder / "x.png").stat().st_size > 0


def test_a_plain_network_is_trained_on_a_plain_data_set(folder):
    ended = python(
        COMMAND,
        "train",
        "--trust=plain",
        "--network=plain.Shrink",
        "--data=plain.Points",
        "--optimizer=torch.optim.AdamW",
        "--process.shape=[1,4,4]",
        "--folder=trained",
        "--steps=2",
        "--batch-size=4",
        "--trackers=[]",
        folder=folder,
    )
    assert ended.returncode == 0, ended.stderr
    assert (folder / "trained" / "ema.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("plot schedules Cosine --out x.png", "plot"),
        ("train digits --steps 1 --folder new", "diffusers"),
        (
            "train --network=plain.Shrink --trust=plain --optimizer=torch.optim.AdamW "
            "--data=Digits --process.shape=[1,8,8] --steps=1 --batch-size=4 --folder=new",
            "train",
        ),
    ],
)
def test_a_command_that_needs_an_extra_names_it_on_one_line(command, extra, folder):
    ended = python(COMMAND, *command.split(), folder=folder)
    assert ended.returncode in (1, 2)
    assert f"pip install 'diffcore[{extra}]'" in ended.stderr, ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_the_integration_of_diffusers_names_its_extra_when_it_is_imported(folder):
    ended = python(BLOCKED + "from diffcore import from_diffusers", folder=folder)
    assert "pip install 'diffcore[diffusers]'" in ended.stderr


def test_info_lists_the_packages_that_are_not_installed(folder):
    ended = python(COMMAND, "info", folder=folder)
    assert ended.returncode == 0, ended.stderr
    assert "torch" in ended.stdout


def test_importing_diffcore_imports_no_torch(folder):
    code = BLOCKED + "import diffcore; assert 'torch' not in sys.modules; dir(diffcore)"
    assert python(code, folder=folder).returncode == 0
