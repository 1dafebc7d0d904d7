"""Pipelines with and without labels that several test files read."""

import pytest


@pytest.fixture(scope="module")
def denoiser():
    from diffcore.core.denoiser import Denoiser
    from tests.helpers.tiny_pipelines import PROCESS, unet

    return Denoiser(unet(num_class_embeds=5), PROCESS)


@pytest.fixture(scope="module")
def folder(denoiser, tmp_path_factory):
    """With a sampler, grid, number of steps and guidance of its own; not to be changed, copy it."""
    from diffcore.guidance import CFG
    from diffcore.integrations.diffusers import DiffcorePipeline
    from diffcore.samplers import Heun
    from diffcore.schedules import Trailing
    from tests.helpers.tiny_pipelines import quiet

    place = tmp_path_factory.mktemp("pipeline")
    quiet(DiffcorePipeline.of(denoiser, Heun(), Trailing(), 3, CFG(2.0))).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def plain():
    from diffcore.core.denoiser import Denoiser
    from diffcore.integrations.diffusers import DiffcorePipeline
    from tests.helpers.tiny_pipelines import PLAIN, quiet, unet

    return quiet(DiffcorePipeline.of(Denoiser(unet(), PLAIN), num_inference_steps=3))
