"""What does not change a run: accumulation, workers, reports, checkpoints, the random state."""

import math
from functools import partial

import pytest
import torch

from tests.helpers.training_runs import (
    LabelRecorder,
    hashes,
    read_checkpoint,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def with_nan(value):
    """A number, or a list of numbers in which null, the loss of no sample, is NaN."""
    if not isinstance(value, list):
        return value
    return [math.nan if number is None else number for number in value]


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulation_equals_one_batch(tmp_path, accumulation):
    train(tmp_path / "whole", clip=0.1)
    train(tmp_path / "parts", clip=0.1, accumulation=accumulation)
    reports = (read_reports(tmp_path / folder) for folder in ("whole", "parts"))
    for whole, parts in zip(*reports, strict=True):
        noise = {"noise_scale", "grad_variance", "grad_square"}  # of several micro-batches alone
        assert parts.keys() - noise == whole.keys()
        for name, value in whole.items():
            expected = pytest.approx(with_nan(value), rel=1e-5, nan_ok=True)
            assert with_nan(parts[name]) == expected, name
    for file in ("model.safetensors", "ema.safetensors"):
        whole, parts = (read_checkpoint(tmp_path / folder)[file] for folder in ("whole", "parts"))
        for name in whole.keys() - {"training_calls"}:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2, "prefetch": 3, "pin_memory": False},
        {"log_every": 1, "save_every": 2},
        {"keep": 1},
    ],
    ids=repr,
)
def test_settings_that_do_not_enter_the_weights_change_no_bit(tmp_path, options):
    train(tmp_path / "first")
    train(tmp_path / "second", **options)
    first, second = (hashes(tmp_path / folder) for folder in ("first", "second"))
    assert {name: second[name] for name in first} == first


def test_runs_of_different_seeds_differ(tmp_path):
    losses = set()
    for seed in (0, 1, 2**40):  # the low 32 bits of the first and the last are equal
        train(tmp_path / str(seed), seed=seed, steps=1)
        losses.add(read_reports(tmp_path / str(seed))[0]["loss"])
    assert len(losses) == 3


def test_the_global_random_state_does_not_enter_a_run(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(tmp_path / str(seed), network=partial(LabelRecorder, dropout=0.5))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
