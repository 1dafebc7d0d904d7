"""A pipeline with attached guidance: what its options, its callbacks and other libraries do."""

import logging

import diffusers
import pytest
import torch

from diffcore.guidance import APG, CFG, PerturbedAttention, Rescale, Sum
from diffcore.integrations.diffusers import DiffcoreScheduler, attach, detach
from diffcore.integrations.diffusers.loading.parts import read_json
from diffcore.samplers import DDIM, DPMSolverPP
from tests.helpers.text_networks import pixart
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    counted_samples,
    relative_difference,
    seed,
    stable_diffusion,
)

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
TEXT = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "output_type": "latent"}
PERTURBED = PerturbedAttention(("mid_block.attentions.0.transformer_blocks.0.attn1",))


def sd():
    return stable_diffusion(
        diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, timestep_spacing="trailing")
    )


def call(pipe, scale=3.0, steps=5, **options):
    return pipe(
        num_inference_steps=steps, guidance_scale=scale, generator=seed(), **TEXT, **options
    ).images


def switch(step, scale):
    """A callback that sets the pipeline's scale after a step, as the documents of diffusers do."""

    def callback(pipe, index, timestep, values):
        if index == step:
            pipe._guidance_scale = scale
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }


@pytest.mark.parametrize("rule", (CFG(3.0), CFG(3.0, PERTURBED)), ids=str)
def test_guidance_that_a_callback_switches_off_ends_there_as_in_the_pipeline(rule):
    pipe = sd()
    pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, sampler=DPMSolverPP("2M"))
    plain = call(pipe, **switch(1, 0.0))
    with attach(pipe, rule), counted_samples(pipe.unet) as counts:
        attached = call(pipe, **switch(1, 0.0))
        assert sum(counts) == 2 + 2 + 1 + 1 + 1
        kept = call(pipe)
    assert not torch.equal(attached, kept)
    if rule == CFG(3.0):
        assert relative_difference(attached, plain) < 1e-5


def test_the_remedy_for_guidance_rescale_gives_the_images_of_the_pipeline():
    pipe = sd()
    expected = call(pipe, guidance_rescale=0.7)
    with attach(pipe, Rescale(CFG(3.0), phi=0.7)):
        # diffusers divides by n - 1 in the standard deviation; the ratio is the same
        assert relative_difference(call(pipe), expected) < 1e-4


def test_the_remedy_for_eta_gives_the_images_of_the_pipeline():
    pipe = sd()
    expected = call(pipe, eta=0.5)
    with attach(pipe, CFG(3.0), sampler=DDIM(eta=0.5)):
        assert relative_difference(call(pipe), expected) < 1e-4
    pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, sampler=DDIM(eta=0.5))
    assert relative_difference(call(pipe, eta=0.0), expected) < 1e-4


def test_guidance_acts_only_where_the_sampler_uses_it(monkeypatch):
    """As a predictor-corrector whose corrections alone are guided."""
    pipe = sd()
    monkeypatch.setattr(DDIM, "uses_guidance", lambda self, state: state.step % 2 == 1)
    with attach(pipe, CFG(3.0)), counted_samples(pipe.unet) as counts:
        call(pipe, steps=4)
    assert counts == [1, 2, 1, 2]


def test_a_pipeline_is_restored_without_the_handle():
    pipe = sd()
    before, scheduler = call(pipe), pipe.scheduler
    detach(pipe)  # nothing is attached
    attach(pipe, CFG(2.0))
    assert relative_difference(call(pipe), before) > 1e-3
    detach(pipe)
    assert pipe.scheduler is scheduler
    assert torch.equal(call(pipe), before)
    assert "save_pretrained" not in vars(pipe)


def test_saving_a_pipeline_with_attached_guidance_warns(tmp_path, caplog):
    pipe = sd()
    with attach(pipe, APG(3.0)), caplog.at_level(logging.WARNING, "diffcore"):
        pipe.save_pretrained(tmp_path / "attached")
    assert "the attached guidance is not: attach it again after loading" in caplog.text
    caplog.clear()
    pipe.save_pretrained(tmp_path / "detached")
    assert "attached guidance" not in caplog.text
    names = [
        read_json(tmp_path / name / "model_index.json")["scheduler"][1]
        for name in ("attached", "detached")
    ]
    assert names == ["DiffcoreScheduler", "DDIMScheduler"]


@pytest.mark.slow
def test_a_compiled_network_is_guided_as_the_network():
    pipe, rule = sd(), Sum((CFG(3.0), CFG(2.0, PERTURBED)))
    with attach(pipe, rule):
        expected = call(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    before = call(pipe)
    with attach(pipe, rule):
        assert relative_difference(call(pipe), expected) < 1e-5
    assert torch.equal(call(pipe), before)


def test_a_pipeline_that_exposes_no_guidance_may_be_called_with_and_without_it():
    pipe = pixart(diffusers.DDIMScheduler(clip_sample=False))
    given = {"num_inference_steps": 2, "output_type": "latent", "use_resolution_binning": False}
    with attach(pipe, CFG(1.0)), counted_samples(pipe.transformer) as counts:
        for scale in (2.0, 1.0):
            pipe("a", guidance_scale=scale, generator=seed(), **given)
    assert set(counts) == {1}
