"""The guider: CFG is that of diffusers, other rules give the samples of diffcore's loop."""

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)

from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    AdaptiveGuidance,
    CFGPlusPlus,
    ComposedConditions,
    Interval,
    LinearAG,
    PerturbedAttention,
    Rescale,
    Sum,
)
from diffcore.integrations.diffusers import DiffcoreGuider, DiffcoreScheduler, attach
from diffcore.samplers import DDIM, DPMSolverPP
from tests.helpers.products import sampled
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    align_parameters,
    counted_samples,
    relative_difference,
    sampling_loop,
    sd3,
    sdxl,
    seed,
    vae,
    xl_unet,
)

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE}
POOLED = {"pooled_prompt_embeds": PROMPT[:, 0], "negative_pooled_prompt_embeds": NEGATIVE[:, 0]}
SIZE = {"height": 16, "width": 16}
ATTENTION = PerturbedAttention(("mid_block.attentions.0.transformer_blocks.0.attn1",))


def modular(block, **components):
    pipe = block().init_pipeline()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl(scheduler=None, **config):
    scheduler = scheduler or diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", **SD | config
    )
    return modular(StableDiffusionXLCoreDenoiseStep, unet=xl_unet(), scheduler=scheduler, vae=vae())


def call(pipe, steps=4, **others):
    return pipe(
        **PROMPTS | POOLED | SIZE | others,
        num_inference_steps=steps,
        generator=seed(),
        output="latents",
    )


@pytest.mark.parametrize("kind", ("DDIM", "EulerDiscrete", "HeunDiscrete"))
def test_cfg_is_the_classifier_free_guidance_of_diffusers(kind):
    """With schedulers of diffusers, also those that keep x/α.

    Of Heun's 2N - 1 evaluations the guider of diffusers guides N, the classic pipeline all.
    """
    others = {"clip_sample": False} if kind == "DDIM" else {}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        timestep_spacing="leading", steps_offset=1, **others, **SD
    )
    pipe, text = xl(scheduler), PROMPTS | POOLED | SIZE
    theirs = sdxl(scheduler)(
        **text, guidance_scale=3.0, num_inference_steps=4, generator=seed(), output_type="latent"
    )
    pipe.update_components(guider=ClassifierFreeGuidance(3.0))
    assert (relative_difference(call(pipe), theirs.images) < 1e-5) == (kind != "HeunDiscrete")
    pipe.update_components(guider=DiffcoreGuider.of(CFG(3.0), pipe.scheduler))
    assert relative_difference(call(pipe), theirs.images) < 1e-5


def evaluate(unet, x, t, label):
    prompt = NEGATIVE if label else PROMPT
    added = {"text_embeds": prompt[:, 0], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    return unet(x, t, encoder_hidden_states=prompt, added_cond_kwargs=added, return_dict=False)[0]


RULES = {
    "conditional": (CFG(1.0), DDIM()),
    "APG": (APG(3.0, momentum=-0.5, threshold=5.0), DDIM()),
    "APG, 2M": (APG(3.0), DPMSolverPP("2M")),
    "Interval": (Interval(APG(3.0), sigma=(0.4, 3.0)), DDIM()),
    "Rescale": (Rescale(CFG(5.0)), DDIM()),
    "AdaptiveGuidance": (AdaptiveGuidance(CFG(3.0)), DDIM()),
    "perturbed attention": (CFG(2.0, ATTENTION), DDIM()),
    "both": (Sum((CFG(2.0, ATTENTION), CFG(3.0))), DDIM()),
}


@pytest.mark.parametrize(
    ("name", "prediction"),
    sampled(list(RULES), ("epsilon", "v_prediction"), count=len(RULES)),
)
def test_a_rule_gives_the_latents_and_evaluations_of_the_sampling_loop(name, prediction):
    rule, sampler = RULES[name]
    pipe = xl(prediction_type=prediction)
    guider = DiffcoreGuider.of(rule, pipe.scheduler)
    ours = DiffcoreScheduler.from_config(
        pipe.scheduler.config, sampler=sampler, levels=guider.levels
    )
    pipe.update_components(guider=guider, scheduler=ours)
    x = torch.randn(1, 4, 8, 8, generator=seed())
    expected, rows = sampling_loop(pipe.unet, evaluate, ours.settings.process, rule, sampler, 5, x)
    with counted_samples(pipe.unet) as counts:
        actual = call(pipe, 5)
    assert relative_difference(actual, expected) < 1e-5
    assert sum(counts) == rows
    assert torch.equal(call(pipe, 5), actual)  # another run begins without the memory of the last
    assert not pipe.unet._forward_pre_hooks


def test_cfg_of_a_flow_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = sd3(scheduler)
    pipe = modular(
        StableDiffusion3T2ICoreDenoiseStep,
        transformer=parts.transformer,
        scheduler=scheduler,
        vae=parts.vae,
    )
    pipe.update_components(guider=ClassifierFreeGuidance(3.0))
    theirs = call(pipe)
    pipe.update_components(guider=DiffcoreGuider.of(CFG(3.0), pipe.scheduler))
    assert relative_difference(call(pipe), theirs) < 1e-5


def test_a_guider_is_saved_and_loaded_with_its_pipeline(tmp_path):
    pipe = xl()
    pipe.update_components(
        guider=DiffcoreGuider.of(Interval(APG(3.0), sigma=(0.4, 3.0)), pipe.scheduler)
    )
    samples = call(pipe)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = StableDiffusionXLCoreDenoiseStep().init_pipeline(str(tmp_path))
    again.load_components()
    again.set_progress_bar_config(disable=True)
    assert again.guider.settings == pipe.guider.settings
    align_parameters(again.unet)
    assert torch.equal(call(again), samples)
    assert again.guider.new(rule=CFG(2.0)).settings.rule == CFG(2.0)


def test_a_call_that_ended_without_guidance_keeps_the_negative_prompt_of_the_next():
    pipe = xl()
    guider = DiffcoreGuider.of(Interval(CFG(3.0), sigma=(5.0, 9.0)), pipe.scheduler)
    assert guider.num_conditions == 2
    pipe.update_components(guider=guider)
    call(pipe)
    assert guider.num_conditions == 2
    guider.disable()
    assert guider.num_conditions == 1
    guider.set_state(0, 1, torch.tensor(500))
    assert len(guider.prepare_inputs({"x": (1, 2)})) == guider.num_conditions == 1


def process(scheduler=None):
    return DiffcoreScheduler.from_config(
        (scheduler or diffusers.DDIMScheduler()).config
    ).settings.process


def without_negative():
    call(with_rule(CFG(3.0)), negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)


def with_rule(rule):
    pipe = xl()
    pipe.update_components(guider=DiffcoreGuider.of(rule, pipe.scheduler))
    return pipe


def test_a_call_that_begins_at_an_image_has_fewer_evaluations():
    """The guider receives the wrong number of steps: levels come from the timesteps alone."""
    pipe = xl()
    classic = PROMPTS | POOLED | {"image": torch.rand(1, 3, 16, 16, generator=seed(5))}
    given = {"num_inference_steps": 5, "strength": 0.6}
    theirs = sdxl(pipe.scheduler, diffusers.StableDiffusionXLImg2ImgPipeline)
    theirs.unet = pipe.unet
    with attach(theirs, Rescale(CFG(5.0))):
        expected = theirs(
            **classic, **given, guidance_scale=2.0, generator=seed(), output_type="latent"
        ).images
    pipe.update_components(guider=DiffcoreGuider.of(Rescale(CFG(5.0)), pipe.scheduler))
    generator = seed()
    latents = retrieved(pipe.vae, classic["image"], generator)
    given |= PROMPTS | POOLED | SIZE | {"image_latents": latents}
    assert (
        relative_difference(pipe(**given, generator=generator, output="latents"), expected) < 1e-5
    )


def retrieved(vae, image, generator):
    """Latents of an image, as pipelines encode it."""
    with torch.no_grad():
        return vae.config.scaling_factor * vae.encode(2 * image - 1).latent_dist.sample(generator)


BAD = [
    (
        lambda: attach(xl(), CFG(3.0)),
        r"accepts a guider: pipe.update_components\(guider=DiffcoreGuider.of\(CFG",
    ),
    (
        lambda: DiffcoreGuider(CFGPlusPlus(0.6), process()),
        "depends on the sampler's steps, which a guider does not",
    ),
    (
        lambda: DiffcoreGuider(LinearAG(CFG(3.0), ((), (0.0, 1.0))), process()),
        "depends on the sampler's steps",
    ),
    (lambda: DiffcoreGuider(GFCG(lambda x, level: x), process()), "reads class labels"),
    (
        lambda: DiffcoreGuider(ComposedConditions((3,), (1.0,)), process()),
        "needs Label.* use Unconditional",
    ),
    (lambda: DiffcoreGuider({"class_path": "CGF"}, process()), "CFG"),
    (
        without_negative,
        "needs the negative half, which the pipeline leaves out: pass negative_prompt",
    ),
    (
        lambda: DiffcoreGuider(CFG(3.0), process()).forward(torch.zeros(1)),
        "has not seen the network's input",
    ),
]


@pytest.mark.parametrize(("misuse", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_rules_and_calls_that_a_guider_cannot_serve_are_refused(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse()


@pytest.mark.parametrize("failing", (1, 2))
def test_a_network_that_fails_in_a_batch_is_restored(failing):
    pipe, batches = xl(), []
    pipe.update_components(guider=DiffcoreGuider.of(CFG(2.0, ATTENTION), pipe.scheduler))

    def fail(module, inputs, output):
        batches.append(output)
        if len(batches) == failing:
            raise RuntimeError("out of memory")

    broken = pipe.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(pipe)
    broken.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    assert len(batches) == failing
