"""Our guidance in a pipeline of each family: theirs with CFG, our own loop's latents and evaluations with APG in Interval."""

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
    flux,
    own,
    rows_of,
    scaled,
    sd3,
    sdxl,
    seed,
    stable_diffusion,
    with_ip_adapter,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps
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


def ask_xl(unet, x, t, label):
    added = {
        "text_embeds": chosen(label)[:, 0],
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
    }
    return unet(
        x, t, encoder_hidden_states=chosen(label), added_cond_kwargs=added, return_dict=False
    )[0]


def ask_ip(unet, x, t, label):
    images = {"image_embeds": [IMAGES[:1] if label else IMAGES[1:]]}
    return unet(
        x, t, encoder_hidden_states=chosen(label), added_cond_kwargs=images, return_dict=False
    )[0]


def ask_sd3(network, x, t, label):
    prompt = chosen(label)
    return network(
        x,
        timestep=t,
        encoder_hidden_states=prompt,
        pooled_projections=prompt[:, 0],
        return_dict=False,
    )[0]


def ask_masked(network, x, t, label, **others):
    mask = MASKS["negative_prompt_attention_mask" if label else "prompt_attention_mask"]
    text = {"encoder_hidden_states": chosen(label), "encoder_attention_mask": mask}
    return network(x, timestep=t, **text, **others, return_dict=False)[0][:, :4]


def ask_sana(network, x, t, label):
    return ask_masked(network, x, t * network.config.timestep_scale, label)


def ask_pixart(network, x, t, label):
    return ask_masked(
        network, x, t, label, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    )


def ask_flux(network, x, t, label):
    prompt = chosen(label)
    places = torch.tensor([[0.0, i // 4, i % 4] for i in range(16)])
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": places}
    text = {"encoder_hidden_states": prompt, "pooled_projections": prompt[:, 0]}
    return network(hidden_states=x, timestep=t / 1000, **text, **ids, return_dict=False)[0]


CONTROLS = controlnet(table()).controlnet


def ask_controlled(unet, x, t, label):
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
    """A pipeline of it, how it is asked about one row, and what a call is given."""

    make: object
    ask: object
    given: dict = field(default_factory=dict)
    shape: tuple = (4, 8, 8)
    scale: str = "guidance_scale"

    def repeated(self, rows):
        """Where a pipeline cannot repeat the embeddings that it was given (StableDiffusion3), they are."""
        if self.ask is not ask_sd3:
            return {"num_images_per_prompt": rows}
        return {
            name: e.repeat(rows, *[1] * (e.ndim - 1))
            for name, e in (TEXT | POOLED).items()
            if name[-3:] == "eds"
        }


FAMILIES = {
    "XL": Family(lambda: sdxl(table()), ask_xl, POOLED | SIZE),
    "ControlNet": Family(lambda: controlnet(table()), ask_controlled, {"image": CONTROL}),
    "IP-adapter": Family(with_images, ask_ip, {"ip_adapter_image_embeds": [IMAGES]}),
    "3": Family(lambda: sd3(flow()), ask_sd3, POOLED | SIZE),
    "PixArt": Family(
        lambda: pixart(table(), diffusers.PixArtSigmaPipeline), ask_pixart, UNBINNED | SIZE
    ),
    "Sana": Family(lambda: sana(flow()), ask_sana, UNBINNED | {"height": 256, "width": 256}),
    "Flux": Family(lambda: flux(flow()), ask_flux, POOLED | SIZE, (16, 16), "true_cfg_scale"),
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
    made = family.make()
    if hasattr(made, "controlnet"):
        made.controlnet.load_state_dict(CONTROLS.state_dict())
    return made


def process_of(pipe):
    return DiffcoreScheduler.from_config(pipe.scheduler.config).settings.process


def test_our_cfg_is_theirs_and_detach_restores_theirs_bit_for_bit(pipe, family):
    """Flows are given times, which either shifts: their default grid ends at a level that is shifted twice."""
    times = (
        {"sigmas": [1.0, 0.8, 0.5, 0.1]} if process_of(pipe).prediction == "flow_prediction" else {}
    )
    before, scheduler = call(pipe, family, **times), pipe.scheduler
    with attach(pipe, guidance=CFG(3.0)):
        ours, again = call(pipe, family, **times), call(pipe, family, scale=8.0, **times)
    assert scaled(ours, before) < 1e-4
    assert torch.equal(ours, again)  # their scale is not used
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(network_of(pipe))
    assert torch.equal(call(pipe, family, **times), before)


def compared(pipe, family, rule, sampler, steps, rows=1):
    """Attached, against our own loop: latents and rows asked about."""
    x = torch.randn(rows, *family.shape, generator=seed())
    expected, planned = own(network_of(pipe), family.ask, process_of(pipe), rule, sampler, steps, x)
    with (
        attach(pipe, guidance=rule, sampler=sampler, grid=Trailing()),
        rows_of(network_of(pipe)) as asked,
    ):
        mine = call(pipe, family, steps=steps, rows=rows, **family.repeated(rows))
    assert scaled(mine, expected) < 1e-5
    assert sum(asked) == planned
    return asked


@pytest.mark.parametrize("sampler", (DPMSolverPP("2M"), Heun()), ids=str)
def test_apg_in_an_interval_is_our_own_loop_row_for_row(pipe, family, sampler):
    asked = compared(pipe, family, RULE, sampler, 5, rows=2)
    assert set(asked) == ({2} if family.scale == "true_cfg_scale" else {2, 4})


def test_one_step_is_our_own_loop(pipe, family):
    compared(pipe, family, CFG(3.0), DDIM(), 1)


@pytest.fixture(scope="module")
def flux_pipe():
    return flux(flow())


@pytest.mark.parametrize(
    ("rule", "rows"),
    [(CFG(1.0), 5), (CFGPlusPlus(0.6), 10), (AdaptiveGuidance(APG(3.0)), 6)],
    ids=str,
)
def test_flux_is_asked_about_its_negative_where_the_rule_needs_it(flux_pipe, rule, rows):
    assert len(compared(flux_pipe, FAMILIES["Flux"], rule, DDIM(), 5)) == rows


@pytest.mark.parametrize("steps", (1, 3))
def test_flux_without_its_negative_is_refused_where_the_rule_needs_it(flux_pipe, steps):
    family = FAMILIES["Flux"]
    plain = call(flux_pipe, family, 1.0, steps, sigmas=[1.0, 0.5, 0.2][:steps])
    with attach(flux_pipe, guidance=CFG(1.0)):
        assert (
            scaled(call(flux_pipe, family, 1.0, steps, sigmas=[1.0, 0.5, 0.2][:steps]), plain)
            < 1e-4
        )
    with (
        pytest.raises(ValueError, match="true_cfg_scale, and a negative prompt"),
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
    "inpaint": (lambda: stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline), IMAGE | MASK),
    "inpaint, 9 channels": (
        lambda: stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline, in_channels=9), IMAGE | MASK
    ),
    "XL image-to-image": (lambda: sdxl(table(), diffusers.StableDiffusionXLImg2ImgPipeline), POOLED | IMAGE),
    "XL image-to-image, refiner": (
        lambda: sdxl(table(), diffusers.StableDiffusionXLImg2ImgPipeline), POOLED | IMAGE | {"denoising_start": 0.5}
    ),
    "Flux image-to-image": (
        lambda: flux(flow(), diffusers.FluxImg2ImgPipeline),
        POOLED | IMAGE | SIZE | {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1], "true_cfg_scale": 3.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_run_that_begins_at_an_image_is_theirs(name):
    make, given = PARTS[name]
    pipe = make()

    def made():
        return pipe(**{"guidance_scale": 3.0} | TEXT | given, generator=seed()).images

    before = made()
    with attach(pipe, guidance=CFG(3.0)):
        assert scaled(made(), before) < 1e-4
    with attach(pipe, guidance=RULE, sampler=Heun()):
        assert torch.isfinite(made()).all()


def test_nine_channels_are_guided_as_their_first_four():
    """APG by hand on latents, mask and masked image, against the attached pipeline, which is asked once."""
    pipe = stable_diffusion(table(), diffusers.StableDiffusionInpaintPipeline, in_channels=9)
    known = torch.randn(1, 5, 8, 8, generator=seed(9))

    def ask(unet, x, t, label):
        return unet(
            torch.cat([x, known], 1), t, encoder_hidden_states=chosen(label), return_dict=False
        )[0]

    x = torch.randn(1, 4, 8, 8, generator=seed())
    expected, _ = own(pipe.unet, ask, process_of(pipe), RULE, DDIM(), 4, x)
    with attach(pipe, guidance=RULE, grid=Trailing()), torch.no_grad():
        pipe._guidance_scale = 3.0
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            both = torch.cat([torch.cat([x, known], 1)] * 2)
            x = pipe.scheduler.step(
                pipe.unet(both, t, torch.cat([NEGATIVE, PROMPT])).sample[:1], t, x
            ).prev_sample
    assert scaled(x, expected) < 1e-5


def test_a_generator_each_makes_a_row_its_own():
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
    assert scaled(together, alone) < 1e-5
    assert scaled(together[:1], together[1:2]) > 0.1


def test_a_pipeline_that_asks_a_third_time_is_refused():
    pipe = sd3(flow())
    with (
        pytest.raises(ValueError, match="calls its network twice at one noise level"),
        attach(pipe, CFG(3.0)),
    ):
        call(pipe, FAMILIES["3"], skip_guidance_layers=[0], skip_layer_guidance_stop=0.9)
