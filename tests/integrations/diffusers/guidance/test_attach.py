"""Attached guidance: CFG is the pipeline's own, other rules give the samples of diffcore's loop."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import diffusers
import pytest
import torch

from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    CFGPlusPlus,
    Interval,
    PerturbedAttention,
    Rescale,
)
from diffcore.integrations.diffusers import DiffcoreScheduler, attach
from diffcore.samplers import DDIM, AlphaBlending, DPMSolverPP, EulerAncestral, Heun
from diffcore.sampling.loop import count_evaluations
from diffcore.schedules import Trailing
from tests.helpers.products import sampled
from tests.helpers.text_networks import pixart
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    dit_pipeline,
    flux,
    relative_difference,
    sampling_loop,
    sd3,
    seed,
    stable_diffusion,
)

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TEXT = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "output_type": "latent"}
POOLED = {"pooled_prompt_embeds": PROMPT[:, 0], "negative_pooled_prompt_embeds": NEGATIVE[:, 0]}
BOUNDS = (0.4, 3.0)


def sd(**config):
    return stable_diffusion(
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **SD | config)
    )


def own_text(pipe, rule, sampler, steps):
    """The latents of our own loop."""

    def evaluate(unet, x, t, label):
        embeddings = NEGATIVE if label else PROMPT
        return unet(x, t, encoder_hidden_states=embeddings, return_dict=False)[0]

    process = DiffcoreScheduler.from_config(pipe.scheduler.config).settings.process
    return sampling_loop(
        pipe.unet,
        evaluate,
        process,
        rule,
        sampler,
        steps,
        torch.randn(1, 4, 8, 8, generator=seed()),
    )[0]


RULES = {
    "CFG": (CFG(3.0), DDIM()),
    "conditional": (CFG(1.0), DDIM()),
    "APG": (APG(3.0, momentum=-0.5, threshold=5.0), DDIM()),
    "APG, 2M": (APG(3.0), DPMSolverPP("2M")),
    "Interval, Heun": (Interval(CFG(3.0), sigma=BOUNDS), Heun()),
    "Interval, 2M": (Interval(CFG(3.0), sigma=BOUNDS), DPMSolverPP("2M")),
    "Interval, midpoint": (Interval(APG(3.0), sigma=BOUNDS), AlphaBlending(2)),
    "CFG++": (CFGPlusPlus(0.6), DDIM()),
    "Rescale": (Rescale(CFG(5.0)), DDIM()),
    "AdaptiveGuidance": (AdaptiveGuidance(CFG(3.0)), DDIM()),
    "perturbed attention": (
        CFG(2.0, PerturbedAttention(("mid_block.attentions.0.transformer_blocks.0.attn1",))),
        DDIM(),
    ),
}


@pytest.mark.parametrize(
    ("name", "prediction"),
    sampled(list(RULES), ("epsilon", "v_prediction"), count=len(RULES)),
)
def test_stable_diffusion_gives_the_latents_of_the_sampling_loop(name, prediction):
    rule, sampler = RULES[name]
    pipe = sd(prediction_type=prediction)
    expected = own_text(pipe, rule, sampler, 5)
    with attach(pipe, guidance=rule, sampler=sampler):
        actual = pipe(num_inference_steps=5, guidance_scale=7.5, generator=seed(), **TEXT).images
    assert relative_difference(actual, expected) < 1e-5


def sd_call(pipe, scale):
    return pipe(num_inference_steps=4, guidance_scale=scale, generator=seed(), **TEXT).images


def sd3_call(pipe, scale):
    return pipe(
        sigmas=[1.0, 0.8, 0.5, 0.1], guidance_scale=scale, generator=seed(), **TEXT | POOLED
    ).images


def dit_call(pipe, scale):
    arguments = {"num_inference_steps": 4, "output_type": "np"}
    return torch.from_numpy(
        pipe([3, 5], guidance_scale=scale, generator=seed(), **arguments).images
    )


PIPES = {
    "StableDiffusion": (sd, sd_call),
    "StableDiffusion3": (
        lambda: sd3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        sd3_call,
    ),
    "DiT": (lambda: dit_pipeline(diffusers.DDIMScheduler(clip_sample=False)), dit_call),
}


@pytest.mark.parametrize("name", PIPES)
def test_attached_cfg_is_the_pipelines_own_and_detach_restores_it_bit_for_bit(name):
    make, call = PIPES[name]
    pipe = make()
    before, scheduler = call(pipe, 3.0), pipe.scheduler
    attached = attach(pipe, guidance=CFG(3.0))
    ours, again = call(pipe, 3.0), call(pipe, 8.0)
    assert relative_difference(ours, before) < 1e-4
    assert torch.equal(ours, again)  # their scale is not used
    attached.detach()
    attached.detach()
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(getattr(pipe, "unet", None) or pipe.transformer)
    assert torch.equal(call(pipe, 3.0), before)
    assert not torch.equal(call(pipe, 8.0), before)


def test_an_error_in_the_context_detaches_and_a_hooked_forward_is_kept():
    pipe = sd()
    hooked = pipe.unet.forward = lambda *args, original=pipe.unet.forward, **kwargs: original(
        *args, **kwargs
    )  # as accelerate's
    with (
        pytest.raises(ValueError, match="set_timesteps has not been called"),
        attach(pipe, CFG(3.0)),
    ):
        pipe.unet(torch.zeros(2, 4, 8, 8), 5)
    assert pipe.unet.forward is hooked


@pytest.mark.parametrize("sampler", (DDIM(), Heun()), ids=str)
def test_interval_evaluates_exactly_the_samples_that_it_needs(sampler):
    pipe, rows, images = sd(), [], 3
    rule = Interval(CFG(3.0), sigma=BOUNDS)
    pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    with attach(pipe, guidance=rule, sampler=sampler):
        pipe(
            num_inference_steps=6,
            guidance_scale=2.0,
            num_images_per_prompt=images,
            generator=seed(),
            **TEXT,
        )
        process = replace(pipe.scheduler.settings.process, classes=1, dropout=0.1)
        knots = pipe.scheduler.call.knots
    inside = (
        sum(
            BOUNDS[0] < knot.ratio * (1 + 1e-9) and knot.ratio <= BOUNDS[1] * (1 + 1e-9)
            for knot in knots[:-1]
        )
        - 1
    )
    assert len(knots) == 6 + 1 + 2  # both bounds are knots
    assert sum(rows) == images * count_evaluations(process, sampler, knots, rule)
    if sampler == DDIM():
        assert sum(rows) == images * (8 + inside)
        assert set(rows) == {images, 2 * images}


def test_arguments_with_both_halves_are_indexed_with_their_samples():
    """ControlNet's residuals and IP-adapter's image embeddings, as an outside loop passes them."""
    pipe, generator = sd(), seed(4)
    residual = torch.randn(2, 16, 4, 4, generator=generator)
    plain = pipe.unet.forward
    extra = {"mid_block_additional_residual": residual, "down_block_additional_residuals": ()}
    seen = []

    def controlled(x, t, text, **kwargs):
        seen.append(kwargs["mid_block_additional_residual"])
        nested = kwargs.pop("added_cond_kwargs")["image_embeds"][0]
        assert torch.equal(nested[:, 0], kwargs["mid_block_additional_residual"][:, 0, 0, 0])
        return plain(
            x,
            t,
            text,
            **kwargs
            | {"down_block_additional_residuals": None, "mid_block_additional_residual": None},
        )

    pipe.unet.forward = controlled
    with attach(pipe, guidance=Interval(CFG(3.0), sigma=BOUNDS)):
        scheduler = pipe.scheduler
        scheduler.set_timesteps(5)
        pipe._guidance_scale = 3.0
        x = torch.randn(1, 4, 8, 8, generator=generator)
        for t in scheduler.timesteps:
            kwargs = extra | {"added_cond_kwargs": {"image_embeds": [residual[:, :, 0, 0]]}}
            out = pipe.unet(
                torch.cat([x, x]), t, torch.cat([NEGATIVE, PROMPT]), return_dict=False, **kwargs
            )[0]
            x = scheduler.step(out[:1], t, x).prev_sample
    assert all(
        torch.equal(r, residual[1:]) if len(r) == 1 else torch.equal(r, residual.flip(0))
        for r in seen
    )
    assert {len(r) for r in seen} == {1, 2}


def flux_true_cfg():
    return flux(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


THREADS = {
    "StableDiffusion": (sd, {"guidance_scale": 2.0}),
    "Flux": (flux_true_cfg, {"true_cfg_scale": 2.0, "height": 16, "width": 16} | POOLED),
}


@pytest.mark.parametrize("name", THREADS)
def test_eight_threads_have_a_memory_each(name):
    make, given = THREADS[name]
    pipe = make()

    def call(i):
        return pipe(num_inference_steps=3 + i % 3, generator=seed(i), **given, **TEXT).images

    with attach(pipe, guidance=APG(3.0, momentum=-0.7)):
        serial = [call(i) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(call, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True))


def test_image_to_image_is_guided_from_its_first_level():
    pipe = stable_diffusion(
        diffusers.DDIMScheduler(clip_sample=False, **SD), diffusers.StableDiffusionImg2ImgPipeline
    )
    image = torch.rand(1, 3, 16, 16, generator=seed(5))

    def call():
        return pipe(
            image=image,
            strength=0.6,
            num_inference_steps=5,
            guidance_scale=3.0,
            generator=seed(),
            **TEXT,
        ).images

    before = call()
    with attach(pipe, guidance=CFG(3.0)):
        assert relative_difference(call(), before) < 1e-4


def again(pipe):
    attach(pipe)
    attach(pipe)


def unguided(pipe):
    with attach(pipe, CFG(3.0)):
        pipe(num_inference_steps=2, guidance_scale=1.0, **TEXT)


def rescaled(pipe):
    with attach(pipe, CFG(3.0)):
        pipe(num_inference_steps=2, guidance_scale=2.0, guidance_rescale=0.7, **TEXT)


def with_eta(pipe):
    with attach(pipe, CFG(3.0)):
        pipe(num_inference_steps=2, guidance_scale=2.0, eta=0.5, **TEXT)


def pix2pix(pipe):
    """Three halves: text and image, image, neither."""
    return stable_diffusion(
        pipe.scheduler, diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=8
    )


BAD = [
    (
        lambda pipe: attach(pix2pix(pipe)),
        "InstructPix2PixPipeline is in no record of a model family",
    ),
    (again, r"has attached guidance already: call .*detach\(pipe\) first"),
    (unguided, "call it with guidance_scale above 1"),
    (rescaled, r"attach Rescale\(CFG\(scale=3.0.*phi=0.7\)"),
    (with_eta, r"step got {'eta': 0.5}, .* such as sampler=DDIM\(eta=0.5\)"),
    (lambda pipe: attach(pipe, CFGPlusPlus(0.6), Heun()), "breaks x = α x_0 .* use DDIM"),
    (lambda pipe: attach(pipe, CFGPlusPlus(0.6), EulerAncestral()), "breaks x = α x_0 .* use DDIM"),
    (lambda pipe: attach(pipe, GFCG(lambda x, level: x)), "reads class labels"),
]


@pytest.mark.parametrize(("misuse", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_cannot_be_guided_is_refused(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse(sd())


def test_a_pipeline_without_its_negative_half_runs_the_conditional_model():
    pipe = sd()
    plain = sd_call(pipe, 1.0)
    with attach(pipe, guidance=CFG(1.0)):
        assert relative_difference(sd_call(pipe, 1.0), plain) < 1e-4
        assert math.isfinite(sd_call(pipe, 5.0).sum())


def test_two_labels_with_one_seed_are_not_taken_for_halves():
    pipe = dit_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    given = {
        "class_labels": [1, 2],
        "guidance_scale": 1.0,
        "num_inference_steps": 3,
        "output_type": "np",
    }
    theirs = torch.from_numpy(pipe(**given, generator=[seed(0), seed(0)]).images)
    with attach(pipe, CFG(1.0)):
        ours = torch.from_numpy(pipe(**given, generator=[seed(0), seed(0)]).images)
    assert relative_difference(ours, theirs) < 1e-5
    with attach(pipe, CFG(3.0)), pytest.raises(ValueError, match="needs the negative half"):
        pipe(**given, generator=[seed(0), seed(0)])


def test_two_prompts_with_one_seed_are_refused_if_the_halves_are_guessed():
    pipe = pixart(diffusers.DDIMScheduler(clip_sample=False))
    given = {"num_inference_steps": 3, "output_type": "latent", "use_resolution_binning": False}
    with attach(pipe, CFG(1.0)):
        with pytest.raises(ValueError, match="pass a different seed for each sample"):
            pipe(["a", "b"], guidance_scale=1.0, generator=[seed(0), seed(0)], **given)
        pipe(["a", "b"], guidance_scale=1.0, generator=[seed(0), seed(1)], **given)
        pipe(["a", "b"], guidance_scale=2.0, generator=[seed(0), seed(0)], **given)


def test_an_edm_network_is_guided_at_x_and_not_at_its_scaled_input():
    pipe = stable_diffusion(diffusers.EDMEulerScheduler(sigma_data=1.0))
    scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config)

    def evaluate(unet, x, t, label):
        scaled = x / (1 + (8 * t).exp()).sqrt()  # t = ln(σ) / 4
        embeddings = NEGATIVE if label else PROMPT
        return unet(scaled, t, encoder_hidden_states=embeddings, return_dict=False)[0]

    rule, process = APG(3.0), scheduler.settings.process
    x = torch.randn(1, 4, 8, 8, generator=seed()) * scheduler.init_noise_sigma
    expected, _ = sampling_loop(pipe.unet, evaluate, process, rule, DDIM(), 4, x)
    with attach(pipe, guidance=rule, sampler=DDIM(), grid=Trailing()):
        actual = pipe(num_inference_steps=4, guidance_scale=3.0, generator=seed(), **TEXT).images
    assert relative_difference(actual, expected) < 1e-5
