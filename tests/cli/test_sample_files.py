"""Many samples: files as they are made, restarts, ranks of a launcher, and samples with NaN."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.io.safetensors import read_weights, write_weights
from diffcore.run import Run
from diffcore.sampling.generation import NonFiniteWarning, sample

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--steps=2", "--batch-size=4", "--guidance.scale=1", "--seeds=0-9")


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def draw(diffcore, run, *options, status=0):
    ended = diffcore("sample", run, *QUICK, *options)
    assert ended.status == status, ended.err
    return ended


def spoil(run):
    """Fill the weights with NaN."""
    path = Path(run, "ema.safetensors")
    weights = read_weights(path)
    weights["conv_in.weight"].fill_(torch.nan)
    write_weights(path, weights)


def test_the_ranks_of_a_launcher_share_the_files_and_their_bits(diffcore, trained, monkeypatch):
    draw(diffcore, trained, "--out=alone")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        ended = draw(diffcore, trained, "--out=shared")
        assert f"rank {rank} of 3: " in ended.out
        assert ("knots" in ended.out) == (rank == 0)
        counts.append(len(files("shared")))
    assert counts == [4, 7, 10]
    assert files("shared") == files("alone")
    for out in ("x.npz", "x.png", "x.safetensors"):
        assert "use --out FOLDER" in draw(diffcore, trained, f"--out={out}", status=1).err


def test_a_restart_draws_only_what_is_missing(diffcore, trained, monkeypatch):
    draw(diffcore, trained, "--out=whole")
    shutil.copytree("whole", "part")
    for seed in (3, 7):
        Path(f"part/seed-{seed}.png").unlink()
    assert "8 existed, 2 samples of" in draw(diffcore, trained, "--out=part").out
    assert files("part") == files("whole")
    assert "10 existed, 0 samples of" in draw(diffcore, trained, "--out=part").out
    assert "5 samples of" in draw(diffcore, trained, "--out=part", "--seeds=10-14").out


def test_files_are_written_chunk_by_chunk(diffcore, trained, monkeypatch):
    seen = []

    def stop_at_the_third(*arguments, **options):
        seen.append(len(files("new")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr("diffcore.cli.commands.sample.sample", stop_at_the_third)
    assert diffcore("sample", trained, *QUICK, "--out=new").status == 130
    assert seen == [0, 4, 8]
    assert len(files("new")) == 8


@pytest.mark.parametrize(
    ("option", "name"),
    [("--steps=3", "steps"), ("--path=true", "path"), ("--sampler=DDIM", "sampler")],
)
def test_samples_of_other_settings_are_not_mixed_in_a_folder(diffcore, trained, option, name):
    draw(diffcore, trained, "--out=new")
    ended = draw(diffcore, trained, "--out=new", option, status=1)
    assert f"holds samples of other settings ({name} differ" in ended.err


def test_samples_of_other_weights_and_of_unknown_settings_are_not_mixed(diffcore, trained):
    shutil.copytree(trained, "run")
    draw(diffcore, "run", "--out=new")
    weights = read_weights(Path("run/ema.safetensors"))
    weights["conv_in.weight"] *= 1.1
    write_weights(Path("run/ema.safetensors"), weights)
    assert "(weights differ" in draw(diffcore, "run", "--out=new", status=1).err
    Path("new/sampling.json").unlink()
    assert "name another folder" in draw(diffcore, "run", "--out=new", status=1).err


def test_a_seed_that_would_be_two_samples_in_one_file_is_refused(diffcore, trained):
    ended = draw(diffcore, trained, "--seeds=5,0,5", "--out=new", status=1)
    assert "seed 5 is repeated" in ended.err
    assert "write .npz" in ended.err
    draw(diffcore, trained, "--seeds=5,0,5", "--out=x.npz")
    x = np.load("x.npz")["x"]
    assert np.array_equal(x[0], x[2])
    assert not np.array_equal(x[0], x[1])


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_of_numpy_hold_the_samples(diffcore, trained, suffix):
    draw(diffcore, trained, "--labels=1,2", "--per-label=5", "--out=x.safetensors")
    draw(diffcore, trained, "--labels=1,2", "--per-label=5", f"--out=sub/x.{suffix}")
    expected, found = read_weights(Path("x.safetensors")), np.load(f"sub/x.{suffix}")
    x = found if suffix == "npy" else found["x"]
    assert np.array_equal(x, expected["x"].numpy())
    if suffix == "npz":
        assert found["label"].tolist() == [1] * 5 + [2] * 5
        assert found["seed"].tolist() == list(range(10))
    assert [path.name for path in Path("sub").iterdir()] == [f"x.{suffix}"]


@pytest.mark.parametrize("out", ["new", "x.npz", "x.png"])
def test_samples_with_nan_are_counted_and_the_command_fails(diffcore, trained, out):
    shutil.copytree(trained, "run")
    spoil("run")
    ended = draw(diffcore, "run", f"--out={out}", status=1)
    assert "10 of 10 samples are not finite, such as that of seed 0" in ended.err
    assert ended.err.count("\n") == 1
    assert files("new") == {}
    if out == "x.npz":
        assert np.isnan(np.load(out)["x"]).any()


def test_sampling_in_python_warns_of_samples_with_nan(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run")
    denoiser = Run(tmp_path / "run").denoiser()
    with pytest.warns(NonFiniteWarning, match="3 of 3 samples are not finite"):
        sample(denoiser, steps=2, seeds=range(3), guidance=CFG(1.0))
    pipe = DiffcorePipeline.of(denoiser, guidance=CFG(1.0), num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(NonFiniteWarning, match="2 of 2 samples are not finite"):
        pipe(seeds=[0, 1], output_type="latent")


def test_progress_is_a_line_now_and_then_without_a_terminal(diffcore, trained, monkeypatch):
    monkeypatch.setattr("diffcore.cli.commands.sample.LINE_INTERVAL", 0.0)
    lines = draw(diffcore, trained, "--out=new").err.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        f"diffcore: {count} of 10 samples" for count in (4, 8, 10)
    ]
