"""What diffusers loads from a fine-tuning run samples what diffcore samples from it."""

import math
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.integrations.diffusers import DiffcorePipeline, Latents
from diffcore.io.safetensors import read_weights
from diffcore.run import Run
from diffcore.training.data.latents import LatentDataset
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.helpers.captioned_images import DISTINCT_CAPTIONS, write_image
from tests.helpers.finetune_runs import (
    OPTIONS,
    diffcore_sample,
    diffusers_sample,
    run_command,
)
from tests.helpers.tiny_pipelines import quiet, unet, vae
from tests.helpers.training_runs import hashes


def load_exported(name):
    """The pipeline that a run wrote, or the original one with its scheduler and adapter."""
    if name == "full":
        return diffusers.StableDiffusionPipeline.from_pretrained("runs/full/pipeline")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("pipeline")
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained("runs/lora/scheduler")
    pipe.load_lora_weights("runs/lora")
    return pipe


def test_diffusers_loads_the_pipeline_of_a_run_and_gives_its_samples(workspace):
    pipe = load_exported("full")
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing"
    for label, prompt in enumerate(DISTINCT_CAPTIONS):
        x, noise = diffcore_sample(workspace / "runs/full", label)
        atol = 5e-6 * x.abs().max().item()
        torch.testing.assert_close(diffusers_sample(pipe, prompt, noise), x, rtol=0, atol=atol)
    average = read_weights(workspace / "runs/full/ema.safetensors")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, average[f"network.{name}"]), name
    for part in ("vae", "text_encoder", "tokenizer"):
        assert hashes(workspace / "runs/full/pipeline" / part) == hashes(
            workspace / "pipeline" / part
        )


def test_diffusers_loads_the_adapter_of_a_run_and_gives_its_samples(workspace):
    x, noise = diffcore_sample(workspace / "runs/lora", DISTINCT_CAPTIONS.index("a dog"))
    pipe, scale = load_exported("lora"), x.abs().max().item()
    adapted = diffusers_sample(pipe, "a dog", noise)
    torch.testing.assert_close(adapted, x, rtol=0, atol=5e-6 * scale)
    base = diffusers.StableDiffusionPipeline.from_pretrained("pipeline")
    base.scheduler = pipe.scheduler
    without = diffusers_sample(base, "a dog", noise)
    assert (adapted - without).abs().max() > 1e-3 * scale
    pipe.unload_lora_weights()
    assert torch.equal(diffusers_sample(pipe, "a dog", noise), without)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_sampled_at_prompts_that_are_no_captions(workspace, name):
    out = f"{name}.safetensors"
    options = ("--sampler=DDIM", "--grid=Trailing", "--steps=4", "--guidance.scale=3")
    prompt = ("--prompt=a horse", "--seeds=5", f"--out={out}")
    assert run_command("sample", f"runs/{name}", *options, *prompt) == 0
    pipe = load_exported(name)
    z = diffusers_sample(pipe, "a horse", Noise(torch.tensor([5]), (4, 8, 8)).start())
    with torch.no_grad():
        expected = Latents(pipe.vae).decode(z)
    images = read_weights(workspace / out)["x"]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_class_conditional_run_on_latents_writes_a_pipeline_with_the_vae(workspace):
    for label, name in enumerate("ab"):
        write_image(workspace / f"classes/{name}/1.png", label)
    process = Process(
        shape=(4, 8, 8), low=-math.inf, high=math.inf, sigma_data=1.0, classes=2, dropout=0.1
    )
    data, run = LatentDataset("classes", "pipeline"), workspace / "runs/classes"
    Trainer(
        network=partial(unet, in_channels=4, out_channels=4, num_class_embeds=3),
        data=data,
        process=process,
        optimizer=torch.optim.AdamW,
        folder=run,
        steps=1,
        lr=LearningRate(1e-3),
        batch_size=4,
        trackers=[],
        sample_every=1,
        sample_steps=2,
    ).train()
    pipe = quiet(DiffcorePipeline.from_pretrained(run / "pipeline"))
    assert (run / "samples/step-00000001.png").is_file()
    (image,) = pipe(class_labels=[1], seeds=[3]).images
    (z,) = pipe(class_labels=[1], seeds=[3], output_type="latent").images
    expected = (data.decode(z[None])[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert abs(np.asarray(image) - expected.numpy()).max() < 0.51


def test_latents_of_three_channels_are_decoded(tmp_path, monkeypatch):
    """Their shape is that of an RGB image."""
    monkeypatch.chdir(tmp_path)
    process = Process(shape=(3, 8, 8), low=-math.inf, high=math.inf, sigma_data=1.0)
    pipe = DiffcorePipeline.of(Denoiser(unet(), process), vae=vae(latent_channels=3))
    pipe.save_pretrained("run/pipeline")
    process.save(Run(tmp_path / "run").process)
    (tmp_path / "run/config.yaml").write_text("network: mine.Network\n")
    options = ("--steps=2", "--guidance.scale=1", "--out=x.safetensors")
    assert run_command("sample", "run", *options) == 0
    assert load_file("x.safetensors")["x"].shape == (1, 3, 16, 16)
