"""Runs that start from a pipeline, from its moved folder, and from the weights of another run."""

import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffcore.cli.image_model import PipelineOptions, load_image_model
from diffcore.core.conditions import batch_condition
from diffcore.integrations.diffusers import PretrainedNetwork
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from tests.helpers.finetune_runs import OPTIONS, finetune_command, run_command

LORA = OPTIONS["lora"]


def test_an_adapter_finds_its_pipeline_from_every_folder(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = workspace / "runs/lora"
    sample = ("sample", str(run), "--prompt=a dog", "--steps=2", "--out=x.png")
    assert run_command(*sample) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run_command("info", str(run)) == 0
    network = Run(run).network()
    trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
    facts = dict(re.findall(r"^(\w[\w ]*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert facts["base pipeline"] == str(workspace / "pipeline")
    assert facts["adapter"] == f"LoRA of rank 2, alpha 6, {trained:,} trained parameters"
    assert facts["condition"].startswith("4 distinct captions, dropped in 10%")


@pytest.mark.slow
def test_a_pipeline_that_was_moved_is_named_in_the_config(workspace, tmp_path, capsys):
    shutil.copytree(workspace / "pipeline", tmp_path / "pipeline")
    run = tmp_path / "run"
    inputs = (f"--pipeline={tmp_path / 'pipeline'}", "--steps=1")
    assert run_command(*finetune_command(run, *LORA, *inputs)) == 0
    (tmp_path / "pipeline").rename(tmp_path / "moved")
    capsys.readouterr()
    sample = ("sample", str(run), "--prompt=a dog", "--steps=2", f"--out={tmp_path / 'x.png'}")
    for command in (sample, ("info", str(run))):
        assert run_command(*command) == 1
        message = capsys.readouterr().err
        assert f"pipeline is {tmp_path / 'pipeline'}, which does not exist" in message
        assert "diffcore lora base RUN --pipeline FOLDER" in message
    config = run / "config.yaml"
    base = ("lora", "base", str(run), f"--pipeline={tmp_path / 'moved'}")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    weights = tmp_path / "other/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    assert run_command(*base[:3], f"--pipeline={tmp_path / 'other'}") == 1
    assert "has other weights than the one that" in capsys.readouterr().err
    # Another path that begins with the folder of the pipeline is left alone.
    beside = f"cache: {tmp_path / 'pipeline'}-cache"
    config.write_text(re.sub(r"cache: .*", beside, config.read_text()))
    assert run_command(*base) == 0
    assert "the weights are the same" in capsys.readouterr().out
    assert beside in config.read_text()
    assert f"{tmp_path / 'pipeline'}\n" not in config.read_text()
    assert run_command(*sample) == 0
    assert run_command("train", f"--config={config}", "--resume=true", "--steps=2") == 0


def test_a_new_run_starts_with_the_adapter_of_another_one(workspace):
    options = ("--init=runs/lora", "--steps=1", "--lr.peak=1e-30", "--seed=3")
    assert run_command(*finetune_command("runs/from-lora", *LORA, *options)) == 0
    expected = read_weights(workspace / "runs/lora/ema.safetensors")
    result = read_weights(workspace / "runs/from-lora/ema.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


def test_the_pipeline_of_a_run_that_diffusers_loads_is_trained_further(workspace):
    options = ("--pipeline=runs/full/pipeline", "--steps=1", "--lr.peak=1e-30")
    assert run_command(*finetune_command("runs/further", *options)) == 0
    before, after = (Run(workspace / name).denoiser() for name in ("runs/full", "runs/further"))
    assert after.process == before.process
    for name, value in before.network.state_dict().items():
        torch.testing.assert_close(after.network.state_dict()[name], value)


def test_the_pipeline_of_another_run_is_refused_with_a_remedy_that_works(
    workspace, trained, tiny, tmp_path, capsys
):
    message = "is a DiffcorePipeline, as a run writes it: start from the weights of this run with"
    with pytest.raises(ValueError, match=message):
        PretrainedNetwork(trained / "pipeline")
    command = finetune_command("runs/no", f"--pipeline={trained / 'pipeline'}")
    assert run_command(*command) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs/no").exists()
    new = ("--steps=1", f"--folder={tmp_path / 'new'}", f"--init={trained}")
    assert run_command("train", "digits", *tiny, *new) == 0


@pytest.mark.slow
def test_a_controlnet_of_prompts_is_sampled_by_prompt_and_image(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipeline", "images"):
        shutil.copytree(workspace / name, name)
    for path in Path("images").glob("*.png"):
        with Image.open(path) as image:
            Path("depth").mkdir(exist_ok=True)
            image.save(Path("depth", path.name))
            image.resize((16, 16)).save(path.stem + ".png")
    record = '{"shape": [3, 16, 16], "low": -1, "high": 1, "dropout": 0.2}'
    control = (
        "--network=diffcore.integrations.diffusers.ControlledNetwork",
        "--network.base=pipeline",
        "--network.embedding=[8,8]",
        '--data.conditions={"control": {"folder": "depth"}}',
        f'--process.conditions={{"control": {record}}}',
        "--ema.decay=0",
    )
    assert run_command(*finetune_command("run", *control)) == 0
    pictures = {}
    for name in ("0.png", "1.png"):
        words = ("--prompt=a dog", "--steps=2", f"--condition.control={name}", "--out=x.npy")
        assert run_command("sample", "run", *words) == 0
        pictures[name] = np.load("x.npy")
    assert np.abs(pictures["0.png"] - pictures["1.png"]).max() > 1e-4
    # The same pipeline in diffusers, with the ControlNet of the run
    denoiser = load_image_model(
        Path("run"), PipelineOptions(("a dog",)), torch.device("cpu")
    ).denoiser
    controlnet = diffusers.ControlNetModel.from_pretrained("run/controlnet")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        "pipeline", controlnet=controlnet
    )
    states = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    generator = torch.Generator().manual_seed(0)
    x, image = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (3, 16, 16)))
    level = denoiser.process.schedule.level(0.5)
    time = denoiser.process.time(level)
    down, middle = controlnet(x, time, states, image, return_dict=False)
    expected = pipe.unet(
        x,
        time,
        states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    condition = batch_condition(denoiser.process, torch.tensor([0]), {"control": image})
    with torch.no_grad():
        found = denoiser.output(x, level, condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
