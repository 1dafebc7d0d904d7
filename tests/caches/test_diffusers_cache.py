"""Caches of diffusers in our loop and in attached pipelines give what diffusers' pipelines give."""

import diffusers
import pytest
import torch
from diffusers import hooks
from einops import rearrange

from diffcore.caches import CachedDenoiser, DeepCache, DiffusersCache, FirstBlockCache
from diffcore.caches.integration import integration, no_integration
from diffcore.core.noise import Noise
from diffcore.guidance import CFG, Interval
from diffcore.integrations.diffusers import attach, from_diffusers
from diffcore.integrations.diffusers.loading.prompts import Prompts
from diffcore.samplers import AlphaBlending, DPMSolverPP, Heun
from diffcore.sampling.loop import integrate
from diffcore.schedules import Trailing
from tests.caches.test_caches import DIT, X, evaluations
from tests.helpers.oracles import unet
from tests.helpers.tiny_pipelines import (
    NEGATIVE,
    NO_TEXT,
    PROMPT,
    flux_transformer,
    quiet,
    relative_difference,
    seed,
    stable_diffusion,
    vae,
)

# diffusers' set_timesteps passes arrays in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
TAYLOR = 'TaylorSeerCacheConfig(cache_interval=3, max_order=2, taylor_factors_dtype="float32")'
BLOCK = "FirstBlockCacheConfig(threshold=0.3)"
RATIOS = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91]
MAG = f"MagCacheConfig(mag_ratios={RATIOS}, threshold=0.2)"
STEPS = 10
SAMPLER, FLUX_SIZE = AlphaBlending(1), {"height": 16, "width": 16}


NETWORK = flux_transformer(layers=2)


def flux():
    text = {name: value for name, value in NO_TEXT.items() if name[-1] != "3"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(
        diffusers.FluxPipeline(
            transformer=NETWORK, vae=vae(shift_factor=0.1), scheduler=scheduler, **text
        )
    )


def call(pipe, scale=1.0, **options):
    """Latents of a pipeline, guided if scale is above 1."""
    negative = {
        "negative_prompt_embeds": NEGATIVE,
        "negative_pooled_prompt_embeds": NEGATIVE[:, 0],
        "true_cfg_scale": scale,
    }
    return pipe(
        prompt_embeds=PROMPT,
        pooled_prompt_embeds=PROMPT[:, 0],
        output_type="latent",
        num_inference_steps=STEPS,
        generator=seed(),
        **FLUX_SIZE,
        **(negative if scale > 1 else {}),
        **options,
    ).images


def config_of(text):
    """The config that a user of diffusers writes."""
    given = {"torch": torch, **vars(hooks)}
    return eval(text.replace('"float32"', "torch.float32"), given)


def of_diffusers(text, scale=1.0, **options):
    pipe = flux()
    config = config_of(text)
    if "Mag" in text:
        config = hooks.MagCacheConfig(
            mag_ratios=RATIOS, threshold=config.threshold, num_inference_steps=STEPS
        )
    pipe.transformer.enable_cache(config)
    try:
        return call(pipe, scale, **options)
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("text", (TAYLOR, BLOCK, MAG), ids=lambda text: text[:9])
@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_an_attached_pipeline_with_a_cache_of_diffusers_is_the_pipeline_of_diffusers(text, scale):
    pipe, exact = flux(), call(flux(), scale)
    expected = of_diffusers(text, scale)
    before = [dict(vars(module)) for module in NETWORK.modules()]
    with attach(pipe, CFG(scale), SAMPLER, cache=DiffusersCache(text)) as attached:
        found = call(pipe, scale)
        assert relative_difference(found, expected) < 1e-6
        assert torch.equal(call(pipe, scale), found)  # empty at the start of each call
        counts = attached.cache_counts
    assert [dict(vars(module)) for module in NETWORK.modules()] == before
    assert sum(counts) == 2 * STEPS * (2 if scale > 1 else 1)
    assert counts.reused >= 2 * 3
    assert relative_difference(found, exact) > 1e-4
    assert torch.equal(call(flux(), scale), exact)


TEXT = {
    "encoder_hidden_states": torch.cat([PROMPT, NEGATIVE]),
    "pooled_projections": torch.cat([PROMPT[:, 0], NEGATIVE[:, 0]]),
}
LATENTS = torch.randn(1, 4, 8, 8, generator=seed(4))


def flux_denoiser():
    return from_diffusers(flux(), prompts=Prompts(TEXT, ("a text",)), shape=(4, 8, 8), dropout=0.1)


def pack(x):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


@torch.no_grad()
def loop(denoiser, scale=1.0, sampler=SAMPLER, guidance=None, **options):
    """Samples of our loop from LATENTS."""
    knots = Trailing().knots(denoiser.process.schedule, STEPS)
    noise, rule = Noise(torch.tensor([0]), (4, 8, 8)), guidance or CFG(scale)
    return integrate(denoiser, sampler, LATENTS, knots, noise, rule, torch.tensor([0]), **options)[
        0
    ]


@pytest.mark.parametrize("text", (TAYLOR, BLOCK, MAG), ids=lambda text: text[:9])
def test_the_sampling_loop_with_a_cache_of_diffusers_is_the_pipeline_of_diffusers(text):
    pipe, denoiser = flux(), flux_denoiser()
    expected = of_diffusers(text, latents=pack(LATENTS))
    cached = CachedDenoiser(denoiser, DiffusersCache(text))
    assert relative_difference(pack(loop(cached)), expected) < 1e-6
    assert sum(cached.counts) == STEPS
    assert cached.counts.reused > 2
    assert torch.equal(loop(denoiser), loop(flux_denoiser()))
    assert relative_difference(pack(loop(denoiser)), call(pipe, latents=pack(LATENTS))) < 1e-6


def test_both_halves_of_guidance_share_the_calls_of_our_loop():
    """TaylorSeer extrapolates each row by itself, so one call or two give the same."""
    cached = CachedDenoiser(flux_denoiser(), DiffusersCache(TAYLOR))
    expected = of_diffusers(TAYLOR, 3.0, latents=pack(LATENTS))
    assert relative_difference(pack(loop(cached, 3.0)), expected) < 1e-6
    assert sum(cached.counts) == STEPS
    parts = loop(cached, 3.0, micro_batch=1)
    assert relative_difference(pack(parts), expected) < 1e-6


@pytest.mark.parametrize("text", (TAYLOR, BLOCK), ids=lambda text: text[:9])
def test_where_guidance_begins_the_state_of_the_hooks_is_empty(text):
    rule = Interval(CFG(3.0), logsnr=(-2.0, 2.0))
    cached = CachedDenoiser(flux_denoiser(), DiffusersCache(text))
    loop(cached, guidance=rule)
    assert cached.counts.computed >= 3


@torch.no_grad()
def test_an_evaluation_outside_of_the_loop_has_no_hooks():
    """As those of references with altered layers, between the evaluations of the loop."""
    denoiser = flux_denoiser()
    cached = CachedDenoiser(denoiser, DiffusersCache("FirstBlockCacheConfig(threshold=1e9)"))
    levels = [denoiser.process.schedule.level(t) for t in (0.8, 0.7)]
    with integration():
        first = [cached(LATENTS, level, torch.tensor([0])).x0 for level in levels]
        with no_integration():
            whole = [cached(LATENTS, level, torch.tensor([0])).x0 for level in levels]
    exact = [denoiser(LATENTS, level, torch.tensor([0])).x0 for level in levels]
    assert torch.equal(torch.cat(whole), torch.cat(exact))
    assert torch.equal(first[0], exact[0])
    assert not torch.equal(first[1], exact[1])
    assert cached.counts == (1, 1)


def test_an_error_in_a_call_leaves_the_network_unchanged():
    before = [dict(vars(module)) for module in NETWORK.modules()]
    cached = CachedDenoiser(flux_denoiser(), DiffusersCache(BLOCK))

    def fail(step, state, prediction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(cached, callback=fail)
    assert [dict(vars(module)) for module in NETWORK.modules()] == before


def test_our_first_block_cache_decides_and_reuses_as_that_of_diffusers():
    """An outside proof: diffusers' hooks on the same transformer, which has no `enable_cache`."""
    network, name = DIT.network, "evaluation"
    hooks.apply_first_block_cache(network, hooks.FirstBlockCacheConfig(threshold=0.15))
    registries = [vars(m).get("_diffusers_hook") for m in network.modules()]
    managers = {
        hook.state_manager
        for registry in registries
        if registry
        for hook in registry.hooks.values()
    }
    try:
        with torch.no_grad():
            for manager in managers:
                manager.set_context(hooks.hooks.CacheContext(name))
            expected = [DIT(X, level, torch.tensor([0, 1])).x0 for level in CLOSE]
    finally:
        for module, registry in zip(network.modules(), registries, strict=True):
            if registry:
                for hook in list(registry.hooks):
                    registry.remove_hook(hook, recurse=False)
                del module._diffusers_hook, module.forward
    cached = CachedDenoiser(DIT, FirstBlockCache(0.15))
    found, exact = evaluations(cached, CLOSE), evaluations(DIT, CLOSE)
    assert 2 <= cached.counts.computed <= len(CLOSE) - 2
    assert not all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


CLOSE = [DIT.process.schedule.level(0.8 - 0.05 * i) for i in range(10)]


@pytest.mark.parametrize("sampler", (Heun(), DPMSolverPP("2M")), ids=str)
def test_caches_that_count_steps_need_one_evaluation_at_each_level(sampler):
    cached = CachedDenoiser(flux_denoiser(), DiffusersCache(TAYLOR))
    if sampler == Heun():
        with pytest.raises(ValueError, match="evaluates a level twice"):
            loop(cached, sampler=sampler)
    else:
        loop(cached, sampler=sampler)
        assert sum(cached.counts) == STEPS


def test_a_cache_of_own_features_works_in_an_attached_pipeline():
    pipe = stable_diffusion(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1))
    text = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE}
    given = {**text, **FLUX_SIZE, "output_type": "latent", "num_inference_steps": 6}

    def latents(cache):
        with attach(pipe, CFG(2.0), cache=cache) as attached:
            return pipe(**given, generator=seed()).images, attached.cache_counts

    exact, _ = latents(None)
    same, counts = latents(DeepCache(1))
    assert torch.equal(same, exact)
    assert counts == (6, 0)
    near, counts = latents(DeepCache(3))
    assert counts == (2, 4)
    assert 1e-5 < relative_difference(near, exact) < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FasterCacheConfig()", "expected one of FirstBlockCacheConfig"),
        ("FirstBlockCacheConfig(0.1)", "expected a name and options"),
        ("__import__('os')", "expected a name and options"),
        ("FirstBlockCacheConfig(threshold=print())", "expected a name and options"),
    ],
)
def test_the_text_of_a_config_is_a_known_name_with_literal_options(text, message):
    with pytest.raises(ValueError, match=message):
        DiffusersCache(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusersCache(BLOCK).check(unet()), "use FirstBlockCache or DeepCache"),
        (lambda: DiffusersCache(BLOCK).check(DIT.network), "with enable_cache"),
        (lambda: DiffusersCache("MagCacheConfig()").check(NETWORK), "mag_ratios"),
        (
            lambda: DiffusersCache("TaylorSeerCacheConfig(every=3)").check(NETWORK),
            "diffusers does not accept",
        ),
        (
            lambda: DiffusersCache('TaylorSeerCacheConfig(cache_identifiers=["none"])').check(
                NETWORK
            ),
            "finds no layer",
        ),
        (lambda: mag(guidance=Interval(CFG(3.0), logsnr=(-2.0, 2.0))), "guidance at all levels"),
        (lambda: mag("num_inference_steps=7"), "for 7 evaluations, and the sampler makes 10"),
    ],
)
def test_what_a_cache_of_diffusers_cannot_do_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert not NETWORK.is_cache_enabled


def mag(options="threshold=0.2", guidance=None):
    text = f"MagCacheConfig(mag_ratios={RATIOS}, {options})"
    return loop(CachedDenoiser(flux_denoiser(), DiffusersCache(text)), guidance=guidance)


def test_a_cache_that_a_user_enabled_is_not_replaced():
    NETWORK.enable_cache(config_of(BLOCK))
    try:
        with pytest.raises(ValueError, match="call its disable_cache"):
            DiffusersCache(BLOCK).check(NETWORK)
        assert NETWORK.is_cache_enabled
    finally:
        NETWORK.disable_cache()
