"""Attached guidance in each family: CFG is the pipeline's own, APG in Interval that of our loop."""

from dataclasses import dataclass, field

import diffusers
import pytest
import torch

from diffcore.guidance import APG, CFG, AdaptiveGuidance, CFGPlusPlus, Interval
from diffcore.integrations.diffusers import DiffcoreScheduler, attach
from diffcore.samplers import DDIM, DPMSolverPP, EulerAncestral, Heun
from diffcore.schedules import Trailing
from tests.helpers.text_networks import pixart, sana
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    controlnet,
    counted_samples,
    flux,
    relative_difference,
    sampling_loop,
    sd3,
    sdxl,
    seed,
    stable_diffusion,
    with_ip_adapter,
)

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
TABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
TEXT = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "output_type": "latent"}
POOLED = {"pooled_prompt_embeds": PROMPT[:, 0], "negative_pooled_prompt_embeds": NEGATIVE[:, 0]}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 5),
    "negative_prompt_attention_mask": torch.tensor([[1.0, 1, 1, 0, 0]]),
}
UNBINNED = MASKS | {"negative_prompt": None, "use_resolution_binning": False}
SIZE = {"height": 16, "width": 16}
CONTROL = torch.rand(1, 3, 16, 16, generator=seed(5))
IMAGES = torch.randn(2, 1, 8, generator=seed(6))
RULE = Interval(APG(3.0, momentum=-0.5), sigma=(0.4, 3.0))


def table():
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **TABLE)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def chosen(label):
    return NEGATIVE if label else PROMPT


def evaluate_xl(unet, x, t, label):
    added = {
        "text_embeds": chosen(label)[:, 0],
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
    }
    return unet(
        x, t, encoder_hidden_states=chosen(label), added_cond_kwargs=added, return_dict=False
    )[0]


def evaluate_ip(unet, x, t, label):
    images = {"image_embeds": [IMAGES[:1] if label else IMAGES[1:]]}
    return unet(
        x, t, encoder_hidden_states=chosen(label), added_cond_kwargs=images, return_dict=False
    )[0]


def evaluate_sd3(network, x, t, label):
    prompt = chosen(label)
    return network(
        x,
        timestep=t,
        encoder_hidden_states=prompt,
        pooled_projections=prompt[:, 0],
        return_dict=False,
    )[0]


def evaluate_masked(network, x, t, label, **others):
    mask = MASKS["negative_prompt_attention_mask" if label else "prompt_attention_mask"]
    text = {"encoder_hidden_states": chosen(label), "encoder_attention_mask": mask}
    return network(x, timestep=t, **text, **others, return_dict=False)[0][:, :4]


def evaluate_sana(network, x, t, label):
    return evaluate_masked(network, x, t * network.config.timestep_scale, label)


def evaluate_pixart(network, x, t, label):
    return evaluate_masked(
        network, x, t, label, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    )


def evaluate_flux(network, x, t, label):
    prompt = chosen(label)
    places = torch.tensor([[0.0, i // 4, i % 4] for i in range(16)])
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": places}
    text = {"encoder_hidden_states": prompt, "pooled_projections": prompt[:, 0]}
    return network(hidden_states=x, timestep=t / 1000, **text, **ids, return_dict=False)[0]


CONTROLS = controlnet(table()).controlnet


def evaluate_controlled(unet, x, t, label):
    text = chosen(label)
    down, mid = CONTROLS(
        x, t, encoder_hidden_states=text, controlnet_cond=CONTROL, return_dict=False
    )
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(x, t, encoder_hidden_states=text, **residuals, return_dict=False)[0]


def with_images():
    pipe = stable_diffusion(table())
    with_ip_adapter(pipe.unet)
    return pipe


@dataclass
class Family:
    """A pipeline, the evaluation of its network for one sample, and the arguments of a call."""

    make: object
    evaluate: object
    given: dict = field(default_factory=dict)
    shape: tuple = (4, 8, 8)
    scale: str = "guidance_scale"

    def repeated(self, rows):
        """Several samples of one prompt; Stable Diffusion 3 cannot repeat embeddings itself."""
        if self.evaluate is not evaluate_sd3:
            return {"num_images_per_prompt": rows}
        return {
            name: e.repeat(rows, *[1] * (e.ndim - 1))
            for name, e in (TEXT | POOLED).items()
            if name[-3:] == "eds"
        }


FAMILIES = {
    "XL": Family(lambda: sdxl(table()), evaluate_xl, POOLED | SIZE),
    "ControlNet": Family(lambda: controlnet(table()), evaluate_controlled, {"image": CONTROL}),
    "IP-adapter": Family(with_images, evaluate_ip, {"ip_adapter_image_embeds": [IMAGES]}),
    "3": Family(lambda: sd3(flow()), evaluate_sd3, POOLED | SIZE),
    "PixArt": Family(
        lambda: pixart(table(), diffusers.PixArtSigmaPipeline), evaluate_pixart, UNBINNED | SIZE
    ),
    "Sana": Family(lambda: sana(flow()), evaluate_sana, UNBINNED | {"height": 256, "width": 256}),
    "Flux": Family(lambda: flux(flow()), evaluate_flux, POOLED | SIZE, (16, 16), "true_cfg_scale"),
}


def call(pipe, family, scale=3.0, steps=4, rows=1, **others):
    latents = torch.randn(rows, *family.shape, generator=seed())
    given = (
        TEXT
        | family.given
        | {family.scale: scale, "num_inference_steps": steps, "latents": latents}
        | others
    )
    return pipe(**given).images


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipe(family):
    pipe = family.make()
    if hasattr(pipe, "controlnet"):
        pipe.controlnet.load_state_dict(CONTROLS.state_dict())
    return pipe


def process_of(pipe):
    return DiffcoreScheduler.from_config(pipe.scheduler.config).settings.process


def test_attached_cfg_is_the_pipelines_own_and_detach_restores_it_bit_for_bit(pipe, family):
    """Flows get explicit times: diffusers shifts the last level of its default grid twice."""
    times = (
        {"sigmas": [1.0, 0.8, 0.5, 0.1]} if process_of(pipe).prediction == "flow_prediction" else {}
    )
    before, scheduler = call(pipe, family, **times), pipe.scheduler
    with attach(pipe, guidance=CFG(3.0)):
        ours, again = call(pipe, family, **times), call(pipe, family, scale=8.0, **times)
    assert relative_difference(ours, before) < 1e-4
    assert torch.equal(ours, again)  # their scale is not used
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(network_of(pipe))
    assert torch.equal(call(pipe, family, **times), before)


def compare_with_loop(pipe, family, rule, sampler, steps, rows=1):
    """Compare latents and evaluated samples with the sampling loop; the counts of each forward."""
    x = torch.randn(rows, *family.shape, generator=seed())
    expected, planned = sampling_loop(
        network_of(pipe), family.evaluate, process_of(pipe), rule, sampler, steps, x
    )
    with (
        attach(pipe, guidance=rule, sampler=sampler, grid=Trailing()),
        counted_samples(network_of(pipe)) as counts,
    ):
        actual = call(pipe, family, steps=steps, rows=rows, **family.repeated(rows))
    assert relative_difference(actual, expected) < 1e-5
    assert sum(counts) == planned
    return counts


@pytest.mark.parametrize(
    "sampler", (DPMSolverPP("2M"), pytest.param(Heun(), marks=pytest.mark.thorough)), ids=str
)
def test_apg_in_an_interval_is_the_sampling_loop_evaluation_for_evaluation(pipe, family, sampler):
    counts = compare_with_loop(pipe, family, RULE, sampler, 5, rows=2)
    assert set(counts) == ({2} if family.scale == "true_cfg_scale" else {2, 4})


def test_one_step_is_that_of_the_sampling_loop(pipe, family):
    compare_with_loop(pipe, family, CFG(3.0), DDIM(), 1)


@pytest.fixture(scope="module")
def flux_pipe():
    return flux(flow())


@pytest.mark.parametrize(
    ("rule", "rows"),
    [(CFG(1.0), 5), (CFGPlusPlus(0.6), 10), (AdaptiveGuidance(APG(3.0)), 6)],
    ids=str,
)
def test_flux_evaluates_its_negative_only_if_the_rule_needs_it(flux_pipe, rule, rows):
    assert len(compare_with_loop(flux_pipe, FAMILIES["Flux"], rule, DDIM(), 5)) == rows


@pytest.mark.parametrize("steps", (1, 3))
def test_flux_without_a_negative_is_refused_if_the_rule_needs_it(flux_pipe, steps):
    family = FAMILIES["Flux"]
    plain = call(flux_pipe, family, 1.0, steps, sigmas=[1.0, 0.5, 0.2][:steps])
    with attach(flux_pipe, guidance=CFG(1.0)):
        assert (
            relative_difference(
                call(flux_pipe, family, 1.0, steps, sigmas=[1.0, 0.5, 0.2][:steps]), plain
            )
            < 1e-4
        )
    with (
        pytest.raises(ValueError, match=r"true_cfg_scale above 1.* a negative prompt"),
        attach(flux_pipe, CFG(3.0)),
    ):
        call(flux_pipe, family, 1.0, steps)


IMAGE = {
    "image": torch.rand(1, 3, 16, 16, generator=seed(8)),
    "num_inference_steps": 5,
    "strength": 0.6,
}
MASK = {"mask_image": (torch.arange(16) < 8).float().expand(1, 1, 16, 16), **SIZE}
PARTS = {
    "inpaint": (
        lambda: stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline),
        IMAGE | MASK,
    ),
    "inpaint, 9 channels": (
        lambda: stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline, in_channels=9),
        IMAGE | MASK,
    ),
    "XL image-to-image": (
        lambda: sdxl(table(), diffusers.StableDiffusionXLImg2ImgPipeline),
        POOLED | IMAGE,
    ),
    "XL image-to-image, refiner": (
        lambda: sdxl(table(), diffusers.StableDiffusionXLImg2ImgPipeline),
        POOLED | IMAGE | {"denoising_start": 0.5},
    ),
    "Flux image-to-image": (
        lambda: flux(flow(), diffusers.FluxImg2ImgPipeline),
        POOLED | IMAGE | SIZE | {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1], "true_cfg_scale": 3.0},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_call_that_begins_at_an_image_is_the_pipelines_own(name):
    make, given = PARTS[name]
    pipe = make()

    def made():
        return pipe(**{"guidance_scale": 3.0} | TEXT | given, generator=seed()).images

    before = made()
    with attach(pipe, guidance=CFG(3.0)):
        assert relative_difference(made(), before) < 1e-4
    with attach(pipe, guidance=RULE, sampler=Heun()):
        assert torch.isfinite(made()).all()


def test_of_nine_channels_the_first_four_are_guided():
    """APG on latents beside mask and masked image, as in the attached pipeline."""
    pipe = stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline, in_channels=9)
    known = torch.randn(1, 5, 8, 8, generator=seed(9))

    def evaluate(unet, x, t, label):
        return unet(
            torch.cat([x, known], 1), t, encoder_hidden_states=chosen(label), return_dict=False
        )[0]

    x = torch.randn(1, 4, 8, 8, generator=seed())
    expected, _ = sampling_loop(pipe.unet, evaluate, process_of(pipe), RULE, DDIM(), 4, x)
    with attach(pipe, guidance=RULE, grid=Trailing()), torch.no_grad():
        pipe._guidance_scale = 3.0
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            both = torch.cat([torch.cat([x, known], 1)] * 2)
            x = pipe.scheduler.step(
                pipe.unet(both, t, torch.cat([NEGATIVE, PROMPT])).sample[:1], t, x
            ).prev_sample
    assert relative_difference(x, expected) < 1e-5


def test_with_a_generator_for_each_sample_they_are_independent():
    pipe = stable_diffusion(table())
    given = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}

    def made(rows, generator):
        text = {
            "prompt_embeds": PROMPT.repeat(rows, 1, 1),
            "negative_prompt_embeds": NEGATIVE.repeat(rows, 1, 1),
        }
        return pipe(**text, **given, generator=generator).images

    with attach(pipe, guidance=RULE, sampler=EulerAncestral()):
        together = made(3, [seed(1), seed(2), seed(3)])
        alone = torch.cat([made(1, seed(number)) for number in (1, 2, 3)])
    assert relative_difference(together, alone) < 1e-5
    assert relative_difference(together[:1], together[1:2]) > 0.1


def test_a_pipeline_with_a_third_evaluation_at_one_level_is_refused():
    pipe = sd3(flow())
    with (
        pytest.raises(ValueError, match="calls its network twice at one noise level"),
        attach(pipe, CFG(3.0)),
    ):
        call(pipe, FAMILIES["3"], skip_guidance_layers=[0], skip_layer_guidance_stop=0.9)
