"""What works with the core dependencies alone, and which extra the error names where
one is needed.
"""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import nn

from diffcore.core.process import Process
from diffcore.io.extras import EXTRAS
from diffcore.io.safetensors import write_weights
from diffcore.run import Run
from diffcore.schedules import Cosine

PROGRAM = f"""
import contextlib, io, json, sys, traceback

def run(words):
    from diffcore.cli.main import main
    return main(words)

def use_integration(words):
    from diffcore import from_diffusers

def import_package(words):
    import diffcore
    assert "torch" not in sys.modules
    dir(diffcore)

sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))
calls = {{"import": import_package, "integration": use_integration}}
for name, words in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = calls.get(name, run)(words) or 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([name, status, out.getvalue(), err.getvalue()]))
"""
"""A program in which no optional dependency can be imported, and which reports several uses."""
NEEDS = {
    "plot": "plot schedules Cosine --out x.png",
    "diffusers": "train digits --steps 1 --folder new",
    "serve": "serve run --trust=plain --port=0",
    "train": "train --network=plain.Shrink --trust=plain --optimizer=torch.optim.AdamW "
    "--data=Digits --process.shape=[1,8,8] --steps=1 --batch-size=4 --folder=new",
}
"""Extra -> a command that needs it."""
USES = NEEDS | {
    "import": "",
    "integration": "",
    "info": "info",
    "sample": "sample run --trust=plain --seeds=0-3 --steps=4 --out=x.png",
    "training": "train --trust=plain --network=plain.Shrink --data=plain.Points "
    "--optimizer=torch.optim.AdamW --process.shape=[1,4,4] --folder=trained --steps=2 "
    "--batch-size=4 --trackers=[]",
}
FIRST = ("import", "integration")
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


class Ended(NamedTuple):
    """How a use ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a module of a plain network, and a run of it."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain.py").write_text(NETWORK)
    run = Run(folder / "run")
    run.folder.mkdir()
    process = Process(Cosine(), "v_prediction", shape=(1, 4, 4))
    process.save(run.process)
    run.config.write_text(yaml.safe_dump({"network": {"class_path": "plain.Shrink"}}))
    network = nn.Module()
    network.scale = nn.Parameter(torch.tensor(0.5))
    write_weights(run.weights, network.state_dict())
    return folder


@pytest.fixture(scope="module")
def uses(folder):
    """How each of `USES` ends, one after the other in a fresh interpreter."""
    words = {name: USES[name].split() for name in sorted(USES, key=lambda name: name not in FIRST)}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads(line) for line in ended.stdout.splitlines()]
    return {name: Ended(*report) for name, *report in reports}


def test_a_run_of_a_plain_network_is_sampled(uses, folder):
    assert uses["sample"].status == 0, uses["sample"].err
    assert (folder / "x.png").stat().st_size > 0


def test_a_plain_network_is_trained_on_a_plain_data_set(uses, folder):
    assert uses["training"].status == 0, uses["training"].err
    assert (folder / "trained" / "ema.safetensors").is_file()


@pytest.mark.parametrize("extra", NEEDS)
def test_a_command_that_needs_an_extra_names_it_on_one_line(uses, extra):
    ended = uses[extra]
    assert ended.status in (1, 2)
    assert f"pip install 'diffcore[{extra}]'" in ended.err, ended.err
    assert len(ended.err.splitlines()) == 1


def test_the_integration_of_diffusers_names_its_extra_when_it_is_imported(uses):
    assert uses["integration"].status == 1
    assert "pip install 'diffcore[diffusers]'" in uses["integration"].err


def test_info_lists_the_packages_that_are_not_installed(uses):
    assert uses["info"].status == 0, uses["info"].err
    assert "torch" in uses["info"].out


def test_importing_diffcore_imports_no_torch(uses):
    assert uses["import"].status == 0, uses["import"].err
