"""Runs with named conditions: the same after a crash, in micro-batches, and on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import condition_runs
from tests.helpers.condition_runs import conditioned_trainer
from tests.helpers.training_runs import crash_after, hashes, read_checkpoint, read_reports

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_close(folder, other):
    """The losses and the weights of two runs agree up to the order of their sums."""
    losses = ([line["loss"] for line in read_reports(each)] for each in (folder, other))
    for loss, expected in zip(*losses, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    for file in ("model.safetensors", "ema.safetensors"):
        found, expected = (read_checkpoint(each)[file] for each in (folder, other))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_with_conditions_writes_the_same_bytes(tmp_path, step):
    conditioned_trainer(tmp_path / "straight", save_every=2).train()
    crash_after(conditioned_trainer(tmp_path / "resumed", save_every=2), step)
    options = {"save_every": 2, "workers": 1 if step == 2 else 0}
    conditioned_trainer(tmp_path / "resumed", resume=True, **options).train()
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def test_the_dropout_of_a_condition_enters_the_weights(tmp_path):
    for dropout in (0.5, 0.0):
        conditioned_trainer(tmp_path / str(dropout), dropout, steps=2).train()
    some, none = (read_reports(tmp_path / each)[0]["loss"] for each in ("0.5", "0.0"))
    assert some != none
    absent = [
        read_checkpoint(tmp_path / each, 2)["model.safetensors"]["absent_low"]
        for each in ("0.5", "0.0")
    ]
    assert absent[0].std() > 0  # it has a gradient from the rows that were dropped
    assert absent[1].std() == 0


def test_accumulation_with_conditions_equals_one_batch(tmp_path):
    conditioned_trainer(tmp_path / "whole").train()
    conditioned_trainer(tmp_path / "parts", accumulation=4).train()
    assert_close(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_with_conditions_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(Path(condition_runs.__file__)), str(tmp_path / "ranks")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    conditioned_trainer(tmp_path / "one").train()
    assert_close(tmp_path / "ranks", tmp_path / "one")
