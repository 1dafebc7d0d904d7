"""Our scheduler in diffusers' pipelines: the same latents as with theirs where theirs is right, in
every thread.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch

from diffcore.integrations.diffusers import DiffcoreScheduler
from diffcore.samplers import DDIM, DDPM, DPMSolverPP, Euler, EulerAncestral, Heun, UniPC
from diffcore.schedules import Trailing
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    dit_pipeline,
    flux,
    quiet,
    relative_difference,
    sd3,
    seed,
    stable_diffusion,
    unet,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TEXT = {
    "prompt_embeds": PROMPT,
    "negative_prompt_embeds": NEGATIVE,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
POOLED = {"pooled_prompt_embeds": PROMPT[:, 0], "negative_pooled_prompt_embeds": NEGATIVE[:, 0]}


def both(pipe, call, **ours):
    """What a pipeline gives with its own scheduler and with ours, made from its config."""
    other = call(pipe)
    pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, **ours)
    return call(pipe), other


EQUAL = {  # theirs, its config, our sampler
    "DDIM": ("DDIM", {"clip_sample": False}, DDIM()),
    "DDIM of Stable Diffusion": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}, DDIM()),
    "DDIM, zero SNR": (
        "DDIM",
        {
            "clip_sample": False,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
        DDIM(),
    ),
    "Euler": ("EulerDiscrete", {"timestep_spacing": "leading"}, Euler()),
    "Euler ancestral": (
        "EulerAncestralDiscrete",
        {"timestep_spacing": "leading"},
        EulerAncestral(),
    ),
    "Heun": ("HeunDiscrete", {"timestep_spacing": "leading"}, Heun()),
    "DPM++ 2M": ("DPMSolverMultistep", {"timestep_spacing": "trailing"}, DPMSolverPP("2M")),
    "DPM++ 2M, to index 0": (
        "DPMSolverMultistep",
        {
            "timestep_spacing": "trailing",
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        },
        DPMSolverPP("2M"),
    ),
    "UniPC": ("UniPCMultistep", {"timestep_spacing": "trailing"}, UniPC(2)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_stable_diffusion_gives_the_latents_of_diffusers(name):
    kind, config, sampler = EQUAL[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config, **SD)

    def call(pipe):
        return pipe(num_inference_steps=4, generator=seed(), **TEXT).images

    mine, other = both(stable_diffusion(scheduler), call, sampler=sampler)
    assert relative_difference(mine, other) < 1e-4


@pytest.mark.parametrize(
    "config", ({}, {"clip_sample": False}, {"timestep_spacing": "trailing"}), ids=str
)
def test_ddpm_gives_the_images_of_its_pipeline_with_its_noise(config):
    """At each step both draw from the generator; where x_0 is clipped, ε follows it."""
    pipe = quiet(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(**config)))

    def call(pipe):
        return torch.from_numpy(pipe(2, seed(), 5, output_type="np").images)

    mine, other = both(pipe, call, sampler=DDPM())
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_ddim_pipeline_with_its_own_clipping_made_consistent():
    pipe = quiet(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()))

    def call(pipe, **options):
        options |= (
            {}
            if isinstance(pipe.scheduler, DiffcoreScheduler)
            else {"use_clipped_model_output": True}
        )
        return torch.from_numpy(
            pipe(2, seed(), num_inference_steps=5, output_type="np", **options).images
        )

    mine, other = both(pipe, call)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"step got {'eta': 0.5}, which the sampler defines"):
        call(pipe, eta=0.5)


@pytest.mark.parametrize("name", ("DDIM", "DPM++ 2M"))
def test_dit_gives_the_images_of_its_pipeline(name):
    kind, config, sampler = EQUAL[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config)

    def call(pipe):
        return torch.from_numpy(
            pipe([3, 5], num_inference_steps=4, generator=seed(), output_type="np").images
        )

    mine, other = both(dit_pipeline(scheduler), call, sampler=sampler)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_sd3_gives_the_latents_of_its_pipeline():
    """With times given, which either shifts; its default grid ends at a level that is shifted
    twice.
    """

    def call(pipe):
        return pipe(sigmas=[1.0, 0.8, 0.5, 0.1], generator=seed(), **TEXT | POOLED).images

    mine, other = both(sd3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), call)
    assert relative_difference(mine, other) < 1e-4


@pytest.mark.parametrize("kind", ("exponential", "linear"))
def test_flux_gives_the_latents_of_its_pipeline(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind
    )
    text = {
        name: TEXT[name] for name in ("prompt_embeds", "negative_prompt_embeds", "output_type")
    } | POOLED
    size = {"height": 16, "width": 16, "num_inference_steps": 4}

    def call(pipe):
        return pipe(generator=seed(), true_cfg_scale=2.0, **size, **text).images

    mine, other = both(flux(scheduler), call, grid=Trailing())
    assert relative_difference(mine, other) < 1e-4


IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("strength", (0.3, 0.5, 1.0))
@pytest.mark.parametrize("name", ("DDIM", "Euler", "Heun"))
def test_image_to_image_begins_where_diffusers_does(name, strength):
    kind, config, sampler = EQUAL[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config, **SD)
    pipe = stable_diffusion(scheduler, diffusers.StableDiffusionImg2ImgPipeline)

    def call(pipe):
        return pipe(
            image=IMAGE, strength=strength, num_inference_steps=6, generator=seed(), **TEXT
        ).images

    mine, other = both(pipe, call, sampler=sampler)
    assert relative_difference(mine, other) < 1e-4


def test_inpainting_keeps_what_is_known():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **SD)
    pipe = stable_diffusion(scheduler, diffusers.StableDiffusionInpaintPipeline)
    mask = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
    what = {"image": IMAGE, "mask_image": mask, "height": 16, "width": 16, "strength": 0.8}

    def call(pipe):
        return pipe(num_inference_steps=5, generator=seed(), **what, **TEXT).images

    mine, other = both(pipe, call)
    assert relative_difference(mine, other) < 1e-4
    pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, sampler=Heun())
    kept = call(pipe)
    assert not torch.equal(kept[..., :4], mine[..., :4])
    torch.testing.assert_close(kept[..., 4:], mine[..., 4:])  # the encoded image


def test_sd3_image_to_image_at_its_strength():
    pipe = sd3(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.StableDiffusion3Img2ImgPipeline,
    )
    what = {
        "image": IMAGE,
        "strength": 0.5,
        "sigmas": [1.0, 0.8, 0.5, 0.1],
        "height": 16,
        "width": 16,
    }

    def call(pipe):
        return pipe(generator=seed(), **what, **TEXT | POOLED).images

    mine, other = both(pipe, call)
    assert relative_difference(mine, other) < 1e-4


@pytest.mark.parametrize("sampler", (DPMSolverPP("2M"), Heun(), EulerAncestral()), ids=str)
def test_four_threads_equal_four_calls(sampler):
    """One pipeline, calls of different seeds and lengths at once."""
    pipe = stable_diffusion(diffusers.DDIMScheduler(clip_sample=False, **SD))
    pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, sampler=sampler)

    def call(i):
        return pipe(num_inference_steps=3 + i % 3, generator=seed(i), **TEXT).images

    serial = [call(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(call, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True))
    assert not torch.equal(serial[0], serial[3])


def test_the_default_levels_of_flux_are_those_of_its_pipeline():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    text = {
        name: TEXT[name] for name in ("prompt_embeds", "negative_prompt_embeds", "output_type")
    } | POOLED

    def call(pipe):
        size = {"height": 16, "width": 16, "num_inference_steps": 3}
        return pipe(generator=seed(), true_cfg_scale=2.0, **size, **text).images

    mine, other = both(flux(scheduler), call)
    assert relative_difference(mine, other) < 1e-4


FRESH_PROCESS = """
import sys
import diffusers
try:
    diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "has not been imported" in str(error), error
else:
    raise AssertionError("documented as refused")
import diffcore.integrations.diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe.scheduler).__name__)
"""


@pytest.mark.slow
def test_a_fresh_process_loads_a_saved_pipeline_after_the_import(tmp_path):
    pipe = diffusers.DDPMPipeline(unet(), DiffcoreScheduler())
    pipe.save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "DiffcoreScheduler\n"), done.stderr
