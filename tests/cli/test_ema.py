"""`diffcore ema`: a run with snapshots, and the average that is reconstructed from them."""

import pytest
import torch

from diffcore.cli.main import main
from diffcore.io.safetensors import read_weights
from diffcore.run import Run

LENGTHS = "[0.05,0.1,0.13]"


@pytest.fixture(scope="module")
def run_with_snapshots(tmp_path_factory, tiny):
    """A run of 60 steps that tracks three averages, with a snapshot every four steps."""
    folder = tmp_path_factory.mktemp("runs") / "averages"
    options = ("--steps=60", "--save-every=30", "--log-every=60", "--snapshots.every=4")
    words = ["train", "digits", *tiny, *options, f"--folder={folder}"]
    assert main([*words, f"--snapshots.lengths={LENGTHS}"]) == 0
    return folder


@pytest.mark.slow
def test_a_reconstruction_equals_the_average_that_the_run_tracked(
    diffcore, run_with_snapshots, tmp_path
):
    """0.13 is reconstructed without its own snapshots."""
    snapshots = Run(run_with_snapshots).snapshots
    others = tmp_path / "run" / "snapshots"
    others.mkdir(parents=True)
    for path in snapshots.glob("length-0.*"):
        if not path.name.startswith("length-0.1300"):
            (others / path.name).hardlink_to(path)
    ended = diffcore("ema", others.parent, "--length=0.13", f"--out={tmp_path / 'new/found'}")
    assert ended.status == 0, ended.err
    assert "30 snapshots -> " in ended.out
    found = read_weights(tmp_path / "new/found")
    expected = read_weights(snapshots / "length-0.1300-step-00000060.safetensors")
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().pow(2).sum() for name in expected)
    norm = sum(value.double().pow(2).sum() for value in expected.values())
    assert (difference / norm).sqrt() < 1e-3


def test_the_network_of_a_run_takes_the_reconstructed_weights(diffcore, run_with_snapshots):
    ended = diffcore("ema", run_with_snapshots, "--length=0.2", "--step=40")
    assert ended.status == 0, ended.err
    run = Run(run_with_snapshots)
    average = read_weights(run.folder / "ema-0.2.safetensors")
    network = run.denoiser(weights=run.folder / "ema-0.2.safetensors").network
    for name, value in network.state_dict().items():
        assert torch.equal(value, average[name])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("ema.safetensors", "a file of the run itself"),
        ("snapshots/length-0.1000-step-00000060.safetensors", "a file of the run itself"),
        ("config.yaml", "expected a name that ends in .safetensors"),
    ],
)
def test_files_of_the_run_are_not_replaced(diffcore, run_with_snapshots, out, message):
    path = run_with_snapshots / out
    before = path.read_bytes()
    ended = diffcore("ema", run_with_snapshots, "--length=0.2", f"--out={path}")
    assert ended.status == 1
    assert message in ended.err
    assert path.read_bytes() == before


def test_a_run_without_snapshots_is_one_line_with_the_remedy(diffcore, trained):
    ended = diffcore("ema", trained, "--length=0.1")
    assert ended.status == 1
    assert "train with --snapshots.lengths '[0.05,0.1]'" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_snapshot_that_is_a_link_out_of_the_run_is_refused(diffcore, tmp_path):
    link = tmp_path / "run/snapshots/length-0.1000-step-00000001.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    ended = diffcore("ema", tmp_path / "run", "--length=0.1")
    assert ended.status == 1
    assert "replace the link by what it leads to" in ended.err
