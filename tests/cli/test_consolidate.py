"""`diffcore consolidate`: weights of a run, also of a sharded checkpoint, as one file."""

import pytest
import torch

from diffcore.io.safetensors import read_weights, read_weights_and_metadata
from diffcore.run import Run
from diffcore.training.checkpoints.checkpoint import Checkpoints
from tests.helpers.training_runs import train


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run of two steps with sharded checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    train(folder, steps=2, save_every=1, checkpoints=Checkpoints("sharded"))
    return folder


def test_the_average_of_a_sharded_checkpoint_becomes_the_file_that_the_run_writes(
    diffcore, sharded, tmp_path
):
    ended = diffcore("consolidate", sharded, "--weights=step-00000002", f"--out={tmp_path / 'x/y'}")
    assert ended.status == 0, ended.err
    assert f"step-00000002 -> {tmp_path / 'x/y'}: " in ended.out
    found, expected = read_weights(tmp_path / "x/y"), read_weights(sharded / "ema.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_raw_weights_of_an_older_step_are_named_after_it(diffcore, sharded):
    assert diffcore("consolidate", sharded, "--weights=step-00000001/raw").status == 0
    tensors, metadata = read_weights_and_metadata(sharded / "step-00000001-raw.safetensors")
    expected = Run(sharded).read_weights("step-00000001/raw").tensors
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert metadata == {}


def test_unknown_weights_are_one_line(diffcore, sharded):
    ended = diffcore("consolidate", sharded, "--weights=step-00000009")
    assert ended.status == 1
    assert "one of averaged, raw, step-00000001, step-00000002" in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("ema.safetensors", "a file of the run itself"),
        ("checkpoints/x.safetensors", "a file of the run itself"),
        ("config.yaml", "expected a name that ends in .safetensors"),
    ],
)
def test_files_of_the_run_are_not_replaced(diffcore, sharded, out, message):
    ended = diffcore("consolidate", sharded, "--weights=raw", f"--out={sharded / out}")
    assert ended.status == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_folder_that_does_not_exist_is_no_run(diffcore, tmp_path):
    assert "is no folder of a run" in diffcore("consolidate", tmp_path / "none").err
