"""A new family is one record: with it a network is loaded, and its pipeline accepts guidance."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from diffcore.core.noise import Noise
from diffcore.guidance import APG, CFG, Interval
from diffcore.integrations.diffusers import attach, encode_prompts, from_diffusers
from diffcore.integrations.diffusers.families import (
    FAMILIES,
    ModelFamily,
    TextCondition,
    register_family,
)
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from tests.helpers.tiny_pipelines import relative_difference, seed, seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # in diffusers


SIGMAS = [1.0, 0.8, 0.5, 0.2]


class ToyTransformer(diffusers.ModelMixin, ConfigMixin):
    """Flow of a pixel from x, half the timestep and one number of text."""

    @register_to_config
    def __init__(self, in_channels=3, sample_size=4, cross_attention_dim=1):
        super().__init__()
        self.layer = nn.Linear(in_channels + 2, in_channels)

    def forward(self, hidden_states, timestep, text, return_dict=True):
        batch, _, height, width = hidden_states.shape
        given = torch.stack([timestep.expand(batch) / 500, text], -1)[:, :, None, None]
        features = torch.cat([hidden_states, given.expand(-1, -1, height, width)], 1)
        return (self.layer(features.movedim(1, -1)).movedim(-1, 1).tanh(),)


class ToyPipeline(diffusers.DiffusionPipeline):
    """Conditional half first; the time input is half the timestep; the text is its length."""

    vae_scale_factor = 1

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    def encode_prompt(self, text):
        return torch.tensor([len(text) / 10])

    @torch.no_grad()
    def __call__(self, prompt, guidance_scale=3.0, latents=None):
        self.do_classifier_free_guidance = guidance_scale > 1
        self.scheduler.set_timesteps(sigmas=SIGMAS)
        text = torch.cat([self.encode_prompt(prompt), self.encode_prompt("")])
        for t in self.scheduler.timesteps:
            condition, negative = self.transformer(
                torch.cat([latents] * 2), t / 2, text=text, return_dict=False
            )[0].chunk(2)
            output = negative + guidance_scale * (condition - negative)
            latents = self.scheduler.step(output, t, latents).prev_sample
        return ImagePipelineOutput(latents)


class ToyText(TextCondition):
    def encode(self, pipeline, text, is_null):
        return {"text": pipeline.encode_prompt(text)}


RECORD = ModelFamily(
    "Toy",
    network="ToyTransformer",
    pipelines=("ToyPipeline",),
    guidance_batching="condition first",
    condition=ToyText(),
    prediction="flow_prediction",
    time_factor=0.5,
)


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr("diffcore.integrations.diffusers.families.records.FAMILIES", [*FAMILIES])
    register_family(RECORD)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ToyPipeline(seeded(lambda: ToyTransformer()), scheduler)


def start():
    return torch.randn(1, 3, 4, 4, generator=seed())


def test_without_its_record_the_network_is_refused():
    network = ToyTransformer()
    with pytest.raises(ValueError, match="no record of a model family describes a ToyTransformer"):
        from_diffusers(network, diffusers.DDIMScheduler())


def test_a_factor_of_the_timestep_is_refused_for_a_table(pipe, monkeypatch):
    record = replace(RECORD, prediction=None)
    monkeypatch.setattr("diffcore.integrations.diffusers.families.records.FAMILIES", [record])
    with pytest.raises(ValueError, match=r"takes 0\.5 times the timestep, which is only possible"):
        from_diffusers(pipe.transformer, diffusers.DDIMScheduler(), prompts=["a"])


def test_the_network_is_loaded_and_gives_the_samples_of_its_pipeline(pipe):
    denoiser = from_diffusers(pipe, prompts=["a red cat", "two dogs"])
    process = denoiser.process
    assert (process.classes, process.dropout, process.shape) == (2, 0.1, (3, 4, 4))
    assert process.time.scale == 500
    assert encode_prompts(pipe, ["a red cat"]).tensors["text"].tolist() == pytest.approx([0.9, 0.0])
    noise = Noise(torch.zeros(1), (3, 4, 4))
    knots = tuple(process.schedule.level(t) for t in (*SIGMAS, 0.0))
    with torch.no_grad():
        x, _ = integrate(
            denoiser, DDIM(), start(), knots, noise, CFG(3.0), condition=torch.tensor([1])
        )
    assert relative_difference(x, pipe("two dogs", latents=start()).images) < 1e-5
    assert (
        sample(denoiser, steps=2, seeds=[0, 1], condition=[0, 1], guidance=CFG(2.0))
        .x.isfinite()
        .all()
    )


def test_attached_guidance_is_its_own_cfg_and_other_rules_are_those_of_the_sampling_loop(pipe):
    expected = pipe("a red cat", latents=start()).images
    with attach(pipe, CFG(3.0)):
        assert (
            relative_difference(
                pipe("a red cat", guidance_scale=8.0, latents=start()).images, expected
            )
            < 1e-5
        )
    denoiser = from_diffusers(pipe, prompts=["a red cat"])
    rule = Interval(APG(3.0), sigma=(0.4, 3.0))
    process = denoiser.process
    knots = tuple(process.schedule.level(t) for t in (*SIGMAS, 0.0))
    knots = insert_levels(knots, rule.levels(process))
    noise = Noise(torch.zeros(1), (3, 4, 4))
    with torch.no_grad():
        x, _ = integrate(denoiser, DDIM(), start(), knots, noise, rule, condition=torch.tensor([0]))
    with attach(pipe, rule):
        assert relative_difference(pipe("a red cat", latents=start()).images, x) < 1e-5
