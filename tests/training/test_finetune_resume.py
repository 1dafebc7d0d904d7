"""Resuming a fine-tuning run: the same bytes on the same data, an error on any other data."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.integrations.diffusers import Latents
from diffcore.integrations.diffusers.adapters.files import ADAPTER
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from tests.helpers.captioned_images import write_image
from tests.helpers.damaged_folders import edit_json
from tests.helpers.finetune_runs import (
    OPTIONS,
    STEPS_PER_CHECKPOINT,
    finetune_command,
    run_command,
)
from tests.helpers.training_runs import crash_at_checkpoint, hashes

LORA = OPTIONS["lora"]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_writes_the_same_bytes_and_encodes_nothing(workspace, name, monkeypatch):
    monkeypatch.setattr(Latents, "posterior", None)
    monkeypatch.setattr(PipelineIndex, "read_text_pipeline", None)
    command = finetune_command(f"runs/stopped-{name}", *OPTIONS[name])
    with crash_at_checkpoint(STEPS_PER_CHECKPOINT):
        assert run_command(*command) == 130  # the status of an interrupt
    assert run_command(*command, "--resume=true") == 0
    straight, resumed = workspace / f"runs/{name}", workspace / f"runs/stopped-{name}"
    expected, result = hashes(straight), hashes(resumed)
    assert result.keys() == expected.keys()
    different = {file for file in expected if expected[file] != result[file]}
    # config.yaml contains the folder, outputs.json the hash of the adapter.
    assert different - {ADAPTER, "checkpoints/outputs.json"} == {"config.yaml"}
    if name == "lora":  # diffusers writes the metadata of this file in no fixed order
        expected, result = load_file(straight / ADAPTER), load_file(resumed / ADAPTER)
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_the_config_that_a_run_writes_resumes_it(workspace):
    before = hashes(workspace / "runs/full")
    assert run_command("train", "--config=runs/full/config.yaml", "--resume=true") == 0
    assert hashes(workspace / "runs/full") == before


def test_a_run_is_not_resumed_on_other_captions(workspace, capsys):
    shutil.copytree("runs/lora", "runs/other")
    shutil.copytree("images", "others")
    (workspace / "others/0.txt").write_text("a fish")
    command = finetune_command("runs/other", *LORA, "--data.folder=others", "--resume=true")
    assert run_command(*command) == 1
    message = "started with another process.classes (4, now 5, the captions of the data?)"
    assert message in capsys.readouterr().err


def test_a_run_is_resumed_on_the_same_files_in_another_folder(workspace, tmp_path, monkeypatch):
    for name in ("images", "pipeline", "runs/lora"):
        shutil.copytree(workspace / name, tmp_path / f"moved/{name}")
    monkeypatch.chdir(tmp_path / "moved")
    Path("pipeline").rename("base")
    inputs = ("--pipeline=base", "--data.cache=mine")
    assert run_command(*finetune_command("runs/lora", *LORA, *inputs, "--resume=true")) == 0


def change_caption(folder):
    """The blue cat is now a bird: as many captions as before."""
    (folder / "images/1.txt").write_text("a bird")


def change_label(folder):
    """Another image is now the blue cat: the same captions as before."""
    (folder / "images/1.txt").write_text("a dog")
    (folder / "images/3.txt").write_text("a blue cat")


def change_image(folder):
    write_image(folder / "images/1.png", 7)


def change_vae(folder):
    edit_json(folder / "pipeline/vae/config.json", scaling_factor=0.5)


def change_frozen_weights(folder):
    """The weights that the adapter is trained beside."""
    path = folder / "pipeline/unet/diffusion_pytorch_model.safetensors"
    tensors = {name: 1.5 * value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


CHANGES = (change_caption, change_label, change_image, change_vae, change_frozen_weights)


@pytest.mark.slow
def test_a_run_is_not_resumed_on_files_that_changed_in_place(
    workspace, tmp_path, monkeypatch, capsys
):
    command = finetune_command("runs/lora", *LORA, "--resume=true")
    for change in (None, *CHANGES):
        folder = tmp_path / str(change and change.__name__)
        for name in ("images", "pipeline", "cache", "runs/lora"):
            shutil.copytree(workspace / name, folder / name)
        monkeypatch.chdir(folder)
        if change is None:
            assert run_command(*command) == 0
            continue
        change(folder)
        before = hashes(folder / "runs")
        assert run_command(*command) == 1, change
        message = " are not those with which the run in runs/lora was started"
        assert message in capsys.readouterr().err, change
        assert hashes(folder / "runs") == before, change
