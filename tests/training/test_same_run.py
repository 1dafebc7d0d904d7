"""The same run in other processes: killed and resumed, bit for bit; split over parts and ranks, to rounding."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, STOP = 60, 30

# A small network with the parts that a real one has; quicker to import than diffusers.
NETWORK = '''
import os, signal

import torch
from torch import nn
from diffcore.training.data import Digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.labels = nn.Linear(1, 16), nn.Embedding(11, 16)
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.norm, self.dropout = nn.GroupNorm(4, 16), nn.Dropout(0.1)

    def forward(self, x, time, class_labels):
        hidden = self.first(x) + (self.time(time[:, None] / 1000) + self.labels(class_labels))[:, :, None, None]
        return self.last(self.dropout(torch.nn.functional.silu(self.norm(hidden))))


class Steady(Net):
    """Without dropout: its mask depends on the rows of a call."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Identity()


class Deadly(Digits):
    """Kills the process when so many items have been read."""

    def __init__(self, split="train"):
        super().__init__(split)
        self.left = int(os.environ.get("DIE_AFTER", -1))

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
'''

CONFIG = """
data: nets.Deadly
network: nets.Net
process: {shape: [1, 8, 8], classes: 10, dropout: 0.1}
objective: {weight: MinSNR}
optimizer: {class_path: torch.optim.AdamW, init_args: {weight_decay: 0.01}}
lr: {peak: 0.001, warmup: 40, shape: cosine}
ema: {decay: 0.99}
folder: run
steps: 60
batch_size: 16
log_every: 7        # so that the checkpoint at 30 stands between two reports
save_every: 10
trackers: []
"""
DIFFCORE = (sys.executable, "-m", "diffcore")
RANKS = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "diffcore",
)


def start(place: Path, *options: str, command=DIFFCORE, **variables: str) -> subprocess.Popen:
    """`diffcore train` in a folder of its own, which becomes its current folder."""
    place.mkdir(exist_ok=True)
    (place / "nets.py").write_text(NETWORK)
    (place / "config.yaml").write_text(CONFIG)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    argv = [*command, "train", "config.yaml", "--trust", "nets", *options]
    return subprocess.Popen(argv, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def expected_files(*steps: int) -> set[str]:
    names = ("model.safetensors", "ema.safetensors", "training.safetensors", "manifest.json")
    checkpoints = {f"checkpoints/step-{step:08d}/{name}" for step in steps for name in names}
    return checkpoints | {"config.yaml", "process.json", "ema.safetensors", "metrics.jsonl"}


def reported(place: Path, name: str) -> list[float]:
    return [
        json.loads(line)[name] for line in (place / "run/metrics.jsonl").read_text().splitlines()
    ]


def test_60_steps_equal_30_steps_killed_and_resumed_bit_for_bit(tmp_path):
    straight = start(tmp_path / "straight")
    killed = start(
        tmp_path / "killed", DIE_AFTER=str(16 * 37 + 5)
    )  # after the report at 35, within step 38
    assert finish(killed)[0] == -signal.SIGKILL
    run = tmp_path / "killed/run"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{STOP:08d}"
    assert reported(tmp_path / "killed", "step") == [7, 14, 21, 28, 35]

    status, said = finish(start(tmp_path / "killed", "--resume=true"))
    assert status == 0, said
    assert f"resumed at step {STOP}" in said
    status, said = finish(straight)
    assert status == 0, said
    whole = hashes(tmp_path / "straight/run")
    assert whole.keys() == expected_files(50, 60)
    resumed = hashes(run)
    whole.pop("config.yaml")  # the resumed run's own says `resume: true`
    resumed.pop("config.yaml")
    assert resumed == whole


# With two ranks: `state.capture` asks the {} that get_state_dict returns on all ranks but the first for its "state".
def test_parts_and_ranks_give_the_same_first_losses(tmp_path):
    options = ("--network=nets.Steady", "--steps=5", "--log-every=1")
    splits = {
        "1x1": start(tmp_path / "1x1", *options),
        "1x4": start(tmp_path / "1x4", *options, "--accumulation=4"),
        "2x2": start(tmp_path / "2x2", *options, "--accumulation=2", command=RANKS),
    }
    for name, process in splits.items():
        status, said = finish(process)
        assert status == 0, f"{name}: {said}"
    whole = reported(tmp_path / "1x1", "loss")
    assert len(set(whole)) == 5
    for name in ("1x4", "2x2"):
        assert reported(tmp_path / name, "loss") == pytest.approx(whole, rel=1e-5), name
    manifest = json.loads(
        (tmp_path / "2x2/run/checkpoints/step-00000005/manifest.json").read_text()
    )
    assert manifest["state"]["processes"] == 2


UNET = (
    "--network.init_args.block_out_channels=[16,32]",
    "--network.init_args.norm_num_groups=8",
    "--network.init_args.dropout=0.1",
    "--trackers=[]",
    "--batch-size=16",
    "--folder=run",
    "--save-every=10",
    "--sample-every=0",
)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [11, 30, 44])
def test_the_recipes_network_is_resumed_bit_for_bit_with_and_without_workers(tmp_path, kill):
    def train(place, *options, **variables):
        place.mkdir(exist_ok=True)
        (place / "nets.py").write_text(NETWORK)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        argv = [
            *DIFFCORE,
            "train",
            "digits",
            "--trust=nets",
            "--data=nets.Deadly",
            *UNET,
            "--steps=60",
            *options,
        ]
        return subprocess.run(
            argv,
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    assert train(tmp_path / "straight").returncode == 0
    assert train(tmp_path / "killed", DIE_AFTER=str(16 * kill)).returncode == -signal.SIGKILL
    resumed = train(tmp_path / "killed", "--resume=true", "--workers=2")
    assert resumed.returncode == 0, resumed.stderr
    whole, other = (hashes(tmp_path / name / "run") for name in ("straight", "killed"))
    whole.pop("config.yaml")
    other.pop("config.yaml")
    assert other == whole
