"""Caches reuse features of one integration, and change nothing else."""

import copy
import threading

import pytest
import torch
from torch import nn

from diffcore.caches import CachedDenoiser, DeepCache, FirstBlockCache
from diffcore.caches.features import Features
from diffcore.caches.integration import integration
from diffcore.core.denoiser import Denoiser
from diffcore.guidance import CFG, Interval, PerturbedAttention
from diffcore.samplers import DDIM, Heun
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Trailing
from tests.helpers.oracles import process, unet
from tests.helpers.recording_network import small_denoiser

RECORD = process(shape=(1, 8, 8))
SEEDS, LABELS = [3, 4, 5], [0, 1, 1]
LEVELS = [Cosine().level(t) for t in (0.8, 0.7, 0.55, 0.4, 0.3)]
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def dit(blocks=4):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    network = DiTTransformer2DModel(
        sample_size=8,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=2,
        norm_num_groups=1,
    ).eval()
    for name, value in network.named_parameters():  # its gates are 0 at the start of a training
        if "norm1" in name or "proj_out" in name:
            nn.init.normal_(value, std=0.05)
    return network


UNET, DIT = Denoiser(unet(), RECORD).eval(), Denoiser(dit(), RECORD).eval()
NETWORKS = {"unet": UNET, "dit": DIT}


def draw(denoiser, guidance=CFG(1.0), steps=6, sampler=DDIM(), **options):
    return sample(
        denoiser,
        sampler,
        Trailing(),
        steps,
        seeds=SEEDS,
        condition=LABELS,
        guidance=guidance,
        batch_size=3,
        **options,
    ).x


def evaluations(denoiser, levels=LEVELS, x=X):
    """Outputs x_0 at some levels, within one integration."""
    with torch.no_grad(), integration():
        return [denoiser(x, level, torch.tensor([0, 1])).x0 for level in levels]


def hooked_unet(level, feature):
    """x_0 of the whole U-Net, with a given input of its last block of the upward arm."""
    if feature is None:
        return UNET(X, level, torch.tensor([0, 1])).x0

    def replace(module, args, kwargs):
        return (feature, *args[1:]), kwargs

    hook = UNET.network.up_blocks[-1].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return UNET(X, level, torch.tensor([0, 1])).x0
    finally:
        hook.remove()


def inputs_of_the_last_block(level):
    kept = []
    hook = UNET.network.up_blocks[-1].register_forward_pre_hook(
        lambda module, args: kept.append(args[0])
    )
    UNET(X, level, torch.tensor([0, 1]))
    hook.remove()
    return kept[0]


@torch.no_grad()
def test_deep_cache_of_a_unet_is_the_network_with_an_earlier_input_of_its_last_block():
    found = evaluations(CachedDenoiser(UNET, DeepCache(3)))
    features = [inputs_of_the_last_block(LEVELS[i]) for i in (0, 3)]
    given = [None, features[0], features[0], None, features[1]]
    for x0, level, feature in zip(found, LEVELS, given, strict=True):
        assert torch.equal(x0, hooked_unet(level, feature))


@torch.no_grad()
def test_deep_cache_of_a_transformer_adds_an_earlier_residual_to_its_first_block():
    blocks, kept = DIT.network.transformer_blocks, []
    hooks = [
        blocks[i].register_forward_hook(lambda module, args, output: kept.append(output))
        for i in (0, 3)
    ]
    DIT(X, LEVELS[0], torch.tensor([0, 1]))
    residual = kept[1] - kept[0]
    for hook in hooks:
        hook.remove()
    first = []
    hooks = [
        blocks[0].register_forward_hook(lambda module, args, output: first.append(output)),
        blocks[3].register_forward_hook(lambda module, args, output: first[0] + residual),
    ]
    expected = DIT(X, LEVELS[1], torch.tensor([0, 1])).x0
    for hook in hooks:
        hook.remove()
    found = evaluations(CachedDenoiser(DIT, DeepCache(2)))[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_features_are_extrapolated_exactly_if_they_are_polynomials_of_the_order():
    def feature(level, degree):
        return torch.tensor([1.0, 2.0]) + sum(level.blend**k for k in range(1, degree + 1))

    for degree in range(4):
        features = Features()
        for level in LEVELS[:4]:
            features = features.add(level, feature(level, degree), degree)
        assert len(features.values) == degree + 1
        torch.testing.assert_close(features.at(LEVELS[4]), feature(LEVELS[4], degree))


@pytest.mark.parametrize("degree", (1, 2, 3))
def test_a_network_whose_deep_residual_is_a_polynomial_is_reused_exactly_at_its_degree(degree):
    network, now = dit(), [LEVELS[0]]

    def block(hidden_states, *args, **kwargs):
        a = now[0].blend
        change = sum((k + 1) * (3 * a) ** k for k in range(degree + 1))
        return hidden_states + change * torch.linspace(-1, 1, 16) ** 2

    for deep in network.transformer_blocks[1:]:
        deep.forward = block
    denoiser = Denoiser(network, RECORD).eval()
    levels = [Cosine().level(0.9 - 0.05 * i) for i in range(2 * degree + 2)]

    def run(denoiser):
        with torch.no_grad(), integration():
            for now[0] in levels:
                yield denoiser(X, now[0], torch.tensor([0, 1])).x0

    cached, lower = (
        CachedDenoiser(denoiser, DeepCache(2, order)) for order in (degree, degree - 1)
    )
    exact, found, rough = (torch.stack(list(run(it))) for it in (denoiser, cached, lower))
    assert cached.counts == (degree + 1, degree + 1)
    torch.testing.assert_close(found[-1], exact[-1], rtol=1e-6, atol=2e-6)
    assert (rough[-1] - exact[-1]).abs().max() > 2e-5  # of a polynomial of lower degree


def test_order_1_is_taylorseer_on_uniform_steps_and_order_2_is_exact_where_it_is_not():
    """TaylorSeer takes backward differences for derivatives, and ours is a polynomial of values."""
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    levels = [Cosine().at_blend(0.9 - 0.1 * i) for i in range(8)]
    values = [torch.tensor([1 + 3 * level.blend + 2 * level.blend**2]) for level in levels]
    for order in (1, 2):
        theirs, ours = TaylorSeerState(torch.float32, order), Features()
        for step in (0, 3, 6):
            theirs.current_step = step
            theirs.update((values[step],))
            ours = ours.add(levels[step], values[step], order)
        theirs.current_step = 7
        (predicted,), extrapolated = theirs.predict(), ours.at(levels[7])
        is_equal = torch.allclose(predicted, extrapolated, atol=1e-5)
        is_exact = torch.allclose(extrapolated, values[7], atol=1e-5)
        assert (is_equal, is_exact) == ((True, False) if order == 1 else (False, True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cache_that_reuses_nothing_is_exact(name):
    cached = CachedDenoiser(NETWORKS[name], DeepCache(1))
    assert torch.equal(draw(cached, CFG(2.0)), draw(NETWORKS[name], CFG(2.0)))
    assert cached.counts == (6, 0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("order", (0, 1))
def test_every_nth_evaluation_computes_the_deep_part(name, order):
    cached = CachedDenoiser(NETWORKS[name], DeepCache(3, order))
    found, exact = draw(cached, CFG(2.0), 7), draw(NETWORKS[name], CFG(2.0), 7)
    assert cached.counts == (3, 4)
    assert not torch.equal(found, exact)
    assert (found - exact).abs().max() < 0.5
    assert torch.equal(draw(cached, CFG(2.0), 7), found)  # empty at the start of each integration
    assert cached.counts == (6, 8)


def test_a_span_of_logsnr_computes_features_before_their_turn():
    assert LEVELS[1].logsnr - LEVELS[0].logsnr > 0.85
    cached = CachedDenoiser(UNET, DeepCache(5, span=0.5))
    evaluations(cached)
    assert cached.counts == (5, 0)
    cached = CachedDenoiser(UNET, DeepCache(5, span=2.0))
    evaluations(cached)
    assert cached.counts == (2, 3)


def test_the_first_block_decides_by_the_change_of_its_residual():
    found = evaluations(CachedDenoiser(DIT, FirstBlockCache(1e-9)))
    exact = evaluations(DIT)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    lax, strict = (CachedDenoiser(DIT, FirstBlockCache(threshold)) for threshold in (1e9, 0.02))
    evaluations(lax)
    evaluations(strict, [LEVELS[0], LEVELS[0], LEVELS[4]])  # no change, and a large one
    assert lax.counts == (1, 4)
    assert strict.counts == (2, 1)


def test_accumulated_changes_add_up_from_evaluation_to_evaluation():
    residuals = []
    hook = DIT.network.transformer_blocks[0].register_forward_hook(
        lambda module, args, output: residuals.append(output - args[0])
    )
    evaluations(DIT)
    hook.remove()
    changes = [
        float((b - a).abs().mean() / a.abs().mean())
        for a, b in zip(residuals, residuals[1:], strict=False)
    ]
    threshold = changes[0] + changes[1] / 2
    cached = CachedDenoiser(DIT, FirstBlockCache(threshold, accumulate=True))
    evaluations(cached, LEVELS[:3])
    assert cached.counts == (2, 1)
    cached = CachedDenoiser(DIT, FirstBlockCache(sum(changes[:2]) * 1.01, accumulate=True))
    evaluations(cached, LEVELS[:3])
    assert cached.counts == (1, 2)


def test_where_guidance_begins_all_features_are_computed():
    rule = Interval(CFG(3.0), logsnr=(-1.0, 1.0))
    cached = CachedDenoiser(UNET, DeepCache(100))
    draw(cached, rule)
    assert cached.counts.computed == 3  # the first evaluation, and both bounds of the interval


def test_other_conditions_of_as_many_samples_share_no_features():
    cached = CachedDenoiser(UNET, DeepCache(100))
    with torch.no_grad(), integration():
        for labels in ([0, 1], [1, 1], [1, 1]):
            cached(X, LEVELS[0], torch.tensor(labels))
    assert cached.counts == (2, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_of_an_altered_network_is_computed_whole(name):
    rule = CFG(2.0, PerturbedAttention(("*attn*", "*attentions*")))
    cached = CachedDenoiser(NETWORKS[name], DeepCache(1))
    assert torch.equal(draw(cached, rule), draw(NETWORKS[name], rule))
    assert cached.counts == (6, 0)


def test_parts_of_a_batch_have_features_of_their_own():
    cached = CachedDenoiser(UNET, DeepCache(2))
    whole = draw(cached, CFG(2.0))
    torch.testing.assert_close(draw(cached, CFG(2.0), micro_batch=2), whole, rtol=0, atol=1e-4)
    assert cached.counts == (3 + 9, 3 + 9)


def test_a_step_of_two_evaluations_is_integrated():
    cached = CachedDenoiser(UNET, DeepCache(2, 1))
    assert draw(cached, sampler=Heun(), steps=3).isfinite().all()
    assert cached.counts == (2, 2)


def test_samplings_in_threads_do_not_mix():
    cached = CachedDenoiser(UNET, DeepCache(3))
    expected = {scale: draw(cached, CFG(scale)) for scale in (1.0, 2.0, 3.0)}
    exact, found = draw(UNET, CFG(2.0)), {}

    def run(key, denoiser, scale):
        found[key] = draw(denoiser, CFG(scale))

    work = [(scale, cached, scale) for scale in expected] + [("exact", UNET, 2.0)]
    threads = [threading.Thread(target=run, args=arguments) for arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[scale], expected[scale]) for scale in expected)
    assert torch.equal(found["exact"], exact)


def test_the_network_is_unchanged_outside_of_an_integration():
    cached = CachedDenoiser(UNET, DeepCache(100))
    evaluations(cached)
    assert not any("forward" in module.__dict__ for module in UNET.network.modules())
    with torch.no_grad():
        outside = [cached(X, level, torch.tensor([0, 1])).x0 for level in LEVELS]
    assert all(torch.equal(a, b) for a, b in zip(outside, evaluations(UNET), strict=True))
    assert cached.counts == (1, 4)
    copy.deepcopy(UNET.network)


def test_a_forward_that_was_replaced_before_is_kept():
    network = unet()
    block = network.mid_block
    given = block.forward
    block.forward = lambda *args, **kwargs: 2 * given(*args, **kwargs)
    own = block.forward
    denoiser = Denoiser(network, RECORD).eval()
    cached = CachedDenoiser(denoiser, DeepCache(1))
    assert torch.equal(evaluations(cached)[0], evaluations(denoiser)[0])
    assert block.forward is own


def test_forwards_are_restored_after_an_error():
    cached = CachedDenoiser(UNET, DeepCache(2))
    with pytest.raises(RuntimeError), integration():
        cached(torch.zeros(2, 3, 8, 8), LEVELS[0], torch.tensor([0, 1]))
    assert not any("forward" in module.__dict__ for module in UNET.network.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepCache(0), "every is 0"),
        (lambda: DeepCache(order=4), "order is 4"),
        (lambda: DeepCache(depth=0), "depth is 0"),
        (lambda: DeepCache(span=0.0), "span is 0"),
        (lambda: FirstBlockCache(0.0), "threshold is 0"),
        (lambda: FirstBlockCache(order=-1), "order is -1"),
        (lambda: CachedDenoiser(UNET, FirstBlockCache()), "use DeepCache"),
        (lambda: CachedDenoiser(UNET, DeepCache(depth=2)), "lower depth"),
        (lambda: CachedDenoiser(DIT, DeepCache(depth=3)), "lower depth"),
        (lambda: CachedDenoiser(small_denoiser(), DeepCache(depth=1)), "two must remain"),
        (
            lambda: CachedDenoiser(
                Denoiser(torch.compile(unet(), backend="eager"), RECORD), DeepCache()
            ),
            "neither compiled",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
