"""`diffcore train` in other processes: killed and resumed to the bit, split over ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training_runs import hashes, read_reports

NETWORKS = '''
"""A network with the layers of a U-Net, imported faster than those of diffusers."""
import os
import signal

from torch import nn

from diffcore.training.data import Digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.labels = nn.Linear(1, 16), nn.Embedding(11, 16)
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.norm, self.dropout = nn.GroupNorm(4, 16), nn.Dropout(0.1)

    def forward(self, x, time, class_labels):
        condition = self.time(time[:, None] / 1000) + self.labels(class_labels)
        hidden = self.norm(self.first(x) + condition[:, :, None, None])
        return self.last(self.dropout(nn.functional.silu(hidden)))


class NetWithoutDropout(Net):
    """Its output for a sample does not depend on the other samples of the batch."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Identity()


class KillingDigits(Digits):
    """Kills the process after KILL_AFTER items, an environment variable."""

    def __init__(self, split="train"):
        super().__init__(split)
        self.left = int(os.environ.get("KILL_AFTER", -1))

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
'''

CONFIG = """
data: nets.KillingDigits
network: nets.Net
process: {shape: [1, 8, 8], classes: 10, dropout: 0.1}
objective: {weight: MinSNR}
optimizer: {class_path: torch.optim.AdamW, init_args: {weight_decay: 0.01}}
lr: {peak: 0.001, warmup: 40, shape: cosine}
ema: {decay: 0.99}
folder: run
steps: 60
batch_size: 16
log_every: 7  # the checkpoint at 30 lies between two reports
save_every: 10
trackers: []
"""
DIFFCORE = (sys.executable, "-m", "diffcore")
TWO_RANKS = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "diffcore",
)


def start(folder: Path, *options: str, command=DIFFCORE, **variables: str) -> subprocess.Popen:
    """Start `diffcore train` with a current folder of its own.

    Args:
        folder: current folder; made if it does not exist.
        options: command-line options.
        command: how diffcore is started.
        variables: environment variables.

    Returns:
        The process.
    """
    folder.mkdir(exist_ok=True)
    (folder / "nets.py").write_text(NETWORKS)
    (folder / "config.yaml").write_text(CONFIG)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    argv = [*command, "train", *options, "--trust=nets"]
    return subprocess.Popen(argv, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """The exit status of a process and its error output."""
    _, err = process.communicate(timeout=600)
    return process.returncode, err


def read_hashes(run: Path) -> dict[str, str]:
    """Hashes of a run's files without config.yaml, which contains `resume`."""
    return {name: value for name, value in hashes(run).items() if name != "config.yaml"}


def read_metric(folder: Path, name: str) -> list[float]:
    """A value of each report of the run in a folder."""
    return [report[name] for report in read_reports(folder / "run")]


def expected_files(*steps: int) -> set[str]:
    """Files of a run with checkpoints after `steps`, without config.yaml."""
    names = ("model.safetensors", "ema.safetensors", "training.safetensors", "manifest.json")
    checkpoints = {f"checkpoints/step-{step:08d}/{name}" for step in steps for name in names}
    files = {"process.json", "ema.safetensors", "metrics.jsonl", "checkpoints/outputs.json"}
    return checkpoints | files


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_writes_the_same_bytes(tmp_path):
    straight = start(tmp_path / "straight", "config.yaml")
    items = 16 * 37 + 5  # after the report at step 35, within step 38
    killed = start(tmp_path / "killed", "config.yaml", KILL_AFTER=str(items))
    assert finish(killed)[0] == -signal.SIGKILL
    run = tmp_path / "killed/run"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-00000030"
    assert read_metric(tmp_path / "killed", "step") == [7, 14, 21, 28, 35]

    status, err = finish(start(tmp_path / "killed", "config.yaml", "--resume=true"))
    assert status == 0, err
    assert "resumed at step 30" in err
    status, err = finish(straight)
    assert status == 0, err
    expected = read_hashes(tmp_path / "straight/run")
    assert expected.keys() == expected_files(50, 60)
    assert read_hashes(run) == expected


@pytest.mark.slow
def test_micro_batches_and_ranks_give_the_same_losses(tmp_path):
    options = ("config.yaml", "--network=nets.NetWithoutDropout", "--steps=5", "--log-every=1")
    runs = {
        "1 rank, 1 micro-batch": start(tmp_path / "1x1", *options),
        "1 rank, 4 micro-batches": start(tmp_path / "1x4", *options, "--accumulation=4"),
        "2 ranks, 2 micro-batches": start(
            tmp_path / "2x2", *options, "--accumulation=2", command=TWO_RANKS
        ),
    }
    for name, process in runs.items():
        status, err = finish(process)
        assert status == 0, f"{name}: {err}"
    expected = read_metric(tmp_path / "1x1", "loss")
    assert len(set(expected)) == 5
    for folder in ("1x4", "2x2"):
        assert read_metric(tmp_path / folder, "loss") == pytest.approx(expected, rel=1e-5), folder
    manifest = tmp_path / "2x2/run/checkpoints/step-00000005/manifest.json"
    assert json.loads(manifest.read_text())["state"]["processes"] == 2


DIGITS = (
    "digits",
    "--data=nets.KillingDigits",
    "--network.init_args.block_out_channels=[16,32]",
    "--network.init_args.norm_num_groups=8",
    "--network.init_args.dropout=0.1",
    "--trackers=[]",
    "--batch-size=16",
    "--folder=run",
    "--save-every=10",
    "--sample-every=0",
    "--steps=60",
)


@pytest.mark.slow
def test_the_recipe_digits_is_killed_and_resumed_with_workers_bit_for_bit(tmp_path):
    """Killed in step 11 after the checkpoint of step 10, and resumed from there; then in step 30
    before its checkpoint, and in step 44.
    """
    straight = start(tmp_path / "straight", *DIGITS)
    for resumed_at, step in ((0, 11), (10, 30), (20, 44)):
        items = str(16 * (step - resumed_at))
        resume = f"--resume={'true' if resumed_at else 'false'}"
        status, err = finish(start(tmp_path / "killed", *DIGITS, resume, KILL_AFTER=items))
        assert status == -signal.SIGKILL, err
        assert (f"resumed at step {resumed_at}" in err) == bool(resumed_at)
    status, err = finish(start(tmp_path / "killed", *DIGITS, "--resume=true", "--workers=2"))
    assert status == 0, err
    assert "resumed at step 40" in err
    status, err = finish(straight)
    assert status == 0, err
    assert read_hashes(tmp_path / "killed/run") == read_hashes(tmp_path / "straight/run")
