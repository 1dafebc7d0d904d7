"""Our guidance in Modular Diffusers: diffusers' own CFG, our own loop's results for the other rules, saved and loaded."""

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
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    PROMPT,
    aligned,
    own,
    rows_of,
    scaled,
    sd3,
    sdxl,
    seed,
    vae,
    xl_unet,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # theirs, in set_timesteps
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
    made = scheduler or diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", **SD | config
    )
    return modular(StableDiffusionXLCoreDenoiseStep, unet=xl_unet(), scheduler=made, vae=vae())


def call(pipe, steps=4, **others):
    return pipe(
        **PROMPTS | POOLED | SIZE | others,
        num_inference_steps=steps,
        generator=seed(),
        output="latents",
    )


@pytest.mark.parametrize("kind", ("DDIM", "EulerDiscrete", "HeunDiscrete"))
def test_our_cfg_is_the_classifier_free_guidance_of_diffusers(kind):
    """Beside their schedulers, whose x may be x/α: the network is asked about x all the same.

    With Heun's 2N - 1 evaluations their guider stops after N, so the classic pipeline is the judge there.
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
    assert (scaled(call(pipe), theirs.images) < 1e-5) == (kind != "HeunDiscrete")
    pipe.update_components(guider=DiffcoreGuider.of(CFG(3.0), pipe.scheduler))
    assert scaled(call(pipe), theirs.images) < 1e-5


def ask(unet, x, t, label):
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


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_latents_of_our_own_loop_at_as_many_evaluations(name, prediction):
    rule, sampler = RULES[name]
    pipe = xl(prediction_type=prediction)
    guider = DiffcoreGuider.of(rule, pipe.scheduler)
    ours = DiffcoreScheduler.from_config(
        pipe.scheduler.config, sampler=sampler, levels=guider.levels
    )
    pipe.update_components(guider=guider, scheduler=ours)
    x = torch.randn(1, 4, 8, 8, generator=seed())
    expected, rows = own(pipe.unet, ask, ours.settings.process, rule, sampler, 5, x)
    with rows_of(pipe.unet) as asked:
        mine = call(pipe, 5)
    assert scaled(mine, expected) < 1e-5
    assert sum(asked) == rows
    assert torch.equal(call(pipe, 5), mine)  # another run begins without the memory of the last
    assert not pipe.unet._forward_pre_hooks


def test_sd3_is_a_flow():
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
    assert scaled(call(pipe), theirs) < 1e-5


def test_it_is_saved_and_loaded_with_its_pipeline(tmp_path):
    pipe = xl()
    pipe.update_components(
        guider=DiffcoreGuider.of(Interval(APG(3.0), sigma=(0.4, 3.0)), pipe.scheduler)
    )
    made = call(pipe)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = StableDiffusionXLCoreDenoiseStep().init_pipeline(str(tmp_path))
    again.load_components()
    again.set_progress_bar_config(disable=True)
    assert again.guider.settings == pipe.guider.settings
    aligned(again.unet)
    assert torch.equal(call(again), made)
    assert again.guider.new(rule=CFG(2.0)).settings.rule == CFG(2.0)


def test_a_run_that_ended_without_guidance_does_not_leave_the_negative_out_of_the_next():
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


def test_a_run_that_begins_at_an_image_has_fewer_evaluations():
    """The guider is told another number of steps than the scheduler took: levels come from the timesteps alone."""
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
    assert scaled(pipe(**given, generator=generator, output="latents"), expected) < 1e-5


def retrieved(vae, image, generator):
    """As pipelines encode an image."""
    with torch.no_grad():
        return vae.config.scaling_factor * vae.encode(2 * image - 1).latent_dist.sample(generator)


BAD = [
    (lambda: attach(xl(), CFG(3.0)), r"accepts a guider: pipe.update_components\(guider=DiffcoreGuider.of\(CFG"),
    (lambda: DiffcoreGuider(CFGPlusPlus(0.6), process()), "depends on the sampler's steps, which a guider does not"),
    (lambda: DiffcoreGuider(LinearAG(CFG(3.0), ((), (0.0, 1.0))), process()), "depends on the sampler's steps"),
    (lambda: DiffcoreGuider(GFCG(lambda x, level: x), process()), "reads class labels"),
    (lambda: DiffcoreGuider(ComposedConditions((3,), (1.0,)), process()), "needs Label.* use Unconditional"),
    (lambda: DiffcoreGuider({"class_path": "CGF"}, process()), "CFG"),
    (without_negative, "needs the negative half, which the pipeline leaves out: pass negative_prompt"),
    (lambda: DiffcoreGuider(CFG(3.0), process()).forward(torch.zeros(1)), "has not seen the network's input"),
]  # fmt: skip


@pytest.mark.parametrize(("misuse", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_a_guider_cannot_do_is_refused(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse()
