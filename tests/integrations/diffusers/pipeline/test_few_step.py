"""Pipelines of few-step networks: they keep what the pair of the network is."""

from dataclasses import replace
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import UNet2DModel

from diffcore.cli.image_model import read_sampling_settings
from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process, TimeConditioning
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.integrations.diffusers.loading.network import from_diffusers
from diffcore.integrations.diffusers.pipeline.export import export_pipeline
from diffcore.integrations.diffusers.pipeline.parity import compare_samples
from diffcore.samplers import DDIM, TCD, Consistency
from diffcore.sampling.generation import sample
from diffcore.schedules import Discrete, Flow, Trailing, UniformBlend
from tests.helpers.oracles import unet

PLAIN = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CLASSES = {True: {"classes": 2, "dropout": 0.0}, False: {}}


def test_a_saved_pipeline_of_a_consistency_network_is_sampled_as_one(tmp_path):
    process = Process(shape=(1, 8, 8), classes=2, dropout=0.1, estimate="consistency")
    pipe = DiffcorePipeline.of(Denoiser(unet(), process), Consistency(), Trailing(), 2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffcorePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.process.estimate == "consistency"
    latents = loaded(class_labels=[0, 1], seeds=[0, 1], output_type="latent").images
    own = sample(loaded.denoiser, None, Trailing(), 2, seeds=[0, 1], condition=[0, 1], batch_size=2)
    assert torch.equal(latents, own.x)
    with pytest.raises(ValueError, match=r"use Consistency\(\)"):
        loaded(class_labels=[0], seeds=[0], sampler=DDIM())


PROCESS = Process(shape=(1, 8, 8), estimate="consistency")
PROCESSES = {
    "v": PROCESS,
    "v, table": replace(PROCESS, schedule=Discrete()),
    "epsilon": replace(PROCESS, schedule=Discrete(), prediction="epsilon"),
    "classes": replace(PROCESS, classes=2),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_diffusers_alone_samples_an_exported_consistency_network_as_we_do(tmp_path, name):
    """ConsistencyModelPipeline or DDPMPipeline with LCMScheduler, in 4 steps."""
    process = PROCESSES[name]
    network = unet() if process.classes else UNet2DModel(**PLAIN).eval()
    pipe = DiffcorePipeline.of(Denoiser(network, process), Consistency(), Trailing(), 4)
    exported = export_pipeline(pipe)
    assert type(exported.scheduler).__name__ == "LCMScheduler"
    exported.save_pretrained(tmp_path)
    assert compare_samples(tmp_path, pipe) < 1e-4
    steps = exported.scheduler.timesteps
    assert len(steps) == 1000
    read = read_sampling_settings(tmp_path)
    assert (read["sampler"]["class_path"], read["sample_steps"]) == ("Consistency", 4)
    assert from_diffusers(tmp_path, **CLASSES[bool(process.classes)]).process.estimate == (
        "consistency"
    )


REFUSED = {
    "sampler": ({}, (TCD(), Trailing(), 4), r"set the sampler to Consistency\(\)"),
    "grid": ({}, (Consistency(), UniformBlend(), 4), r"set the grid to Trailing\(\)"),
    "steps": ({}, (Consistency(), Trailing(), 3), r"steps to a divisor of 1000"),
    "flow": (
        {"schedule": Flow(), "prediction": "flow_prediction"},
        (Consistency(), Trailing(), 4),
        r"LCMScheduler has no prediction type flow_prediction",
    ),
    "scaling": (
        {"schedule": Flow(), "prediction": "v_prediction"},
        (Consistency(), Trailing(), 4),
        r"scaling flow",
    ),
    "time": ({"time": TimeConditioning("t")}, (Consistency(), Trailing(), 4), r"index"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lcm_scheduler_does_not_express_is_refused_with_the_reason(case):
    fields, sampling, message = REFUSED[case]
    process = replace(PROCESS, **fields)
    pipe = DiffcorePipeline.of(Denoiser(UNet2DModel(**PLAIN), process), *sampling)
    with pytest.raises(ValueError, match=message):
        export_pipeline(pipe)


def test_the_steps_of_tcd_are_those_of_diffusers_which_ends_at_the_first_entry():
    """On the exact consistency function of a Gaussian."""
    table = Discrete("scaled_linear", start=0.00085, end=0.012)
    spread = torch.tensor([0.8, 0.3])
    scheduler = diffusers.TCDScheduler()
    scheduler.set_timesteps(5)

    def predict(x, level, condition=None):
        norm = (level.alpha**2 * spread**2 + level.sigma**2) ** 0.5
        x0 = spread * x / norm
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    noise = Noise(torch.arange(64), (2,))
    knots = Trailing().knots(table, 5)
    state, other = TCD().start(x, knots, noise), x
    draws = iter(range(5))
    for t in scheduler.timesteps:
        eps = predict(other, table.level((int(t) + 1) / 1000)).eps
        with patch.object(
            diffusers.schedulers.scheduling_tcd,
            "randn_tensor",
            lambda *_, **__: noise.step(next(draws)),
        ):
            other = scheduler.step(eps, int(t), other).prev_sample
        prediction = predict(state.x, state.level)
        state = TCD().advance(state, prediction, noise)
        if not state.done:
            torch.testing.assert_close(state.x, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction.at(table.level(1 / 1000)), other, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.x, prediction.x0)
