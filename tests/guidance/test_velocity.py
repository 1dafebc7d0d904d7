"""CFG++ and CFG-Zero*: their formulas, and the first steps of CFG-Zero*."""

import math

import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG, CFGPlusPlus, CFGZeroStar, GuidanceInput, Interval, Step
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Cosine, Flow, Trailing, UniformLogSNR
from tests.helpers.oracles import SCALINGS, Pair, mixture, process

LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
X = 2 * NOISE.start()


def pair_at(scaling, logsnr):
    oracle = mixture(process(Cosine(scaling=scaling)))
    level = oracle.process.schedule.at(logsnr)
    return oracle, level, oracle(X, level, LABELS), oracle(X, level)


@pytest.mark.parametrize("w", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_cfg_plus_plus_steps_to_the_guided_x0_and_renoises_with_the_reference(scaling, w):
    """w = 0: unconditional DDIM; w = 1: the conditional x_0 with the unconditional ε."""
    oracle, level, c, u = pair_at(scaling, -0.4)
    target = oracle.process.schedule.at(1.5)
    x, _ = integrate(oracle, DDIM(), X, (level, target), NOISE, CFGPlusPlus(w), LABELS)
    expected = target.alpha * ((1 - w) * u.x0 + w * c.x0) + target.sigma * u.eps
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    if w == 0:
        plain, _ = integrate(oracle, DDIM(), X, (level, target), NOISE, CFG(0.0), LABELS)
        torch.testing.assert_close(x, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_step_of_cfg_plus_plus_is_one_of_cfg_with_another_scale(scaling):
    """w' = w u/(u - u'), u = σ/α before the step and u' after it."""
    oracle, level, _, _ = pair_at(scaling, -0.4)
    target = oracle.process.schedule.at(1.5)
    w = 0.6 * level.ratio / (level.ratio - target.ratio)
    ours, _ = integrate(oracle, DDIM(), X, (level, target), NOISE, CFGPlusPlus(0.6), LABELS)
    cfg, _ = integrate(oracle, DDIM(), X, (level, target), NOISE, CFG(w), LABELS)
    torch.testing.assert_close(ours, cfg, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rule", (CFGPlusPlus(0.5), Interval(CFGPlusPlus(0.5), sigma=(0.1, 1.0))), ids=str
)
def test_cfg_plus_plus_is_for_first_order_samplers(rule):
    with pytest.raises(ValueError, match=r"breaks x = α x_0 \+ σ ε.*DDIM"):
        sample(mixture(), AlphaBlending(2), steps=4, seeds=[1], condition=[0], guidance=rule)
    for sampler in (DDIM(), DDIM(1.0), AlphaBlending(1)):
        assert (
            sample(mixture(), sampler, steps=4, seeds=[1], condition=[0], guidance=rule)
            .x.isfinite()
            .all()
        )


@pytest.mark.parametrize("w", (-0.1, 1.1, math.nan))
def test_a_scale_that_does_not_interpolate_is_refused(w):
    with pytest.raises(ValueError, match=r"expected w within \[0, 1\]"):
        CFGPlusPlus(w)
    with pytest.raises(ValueError, match=r"expected"):
        sample(mixture(), steps=2, seeds=[1], condition=[0], guidance=CFGPlusPlus(lambda logsnr: w))


@pytest.mark.parametrize("w", (0.0, 0.5, 4.0))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_cfg_zero_star_is_the_published_scale_on_the_velocity(scaling, w):
    oracle, level, c, u = pair_at(scaling, 0.3)
    guided, _, evaluations = guided_prediction(
        oracle, CFGZeroStar(w, zero_init=0), X, level, LABELS, None
    )
    v_c, v_u = c.eps - c.x0, u.eps - u.x0
    s = cfg_zero_star_scale(v_c, v_u)
    torch.testing.assert_close(
        guided.eps - guided.x0, v_u * s + w * (v_c - v_u * s), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(guided.at(level), X, rtol=1e-10, atol=1e-10)
    assert evaluations == 2


def test_the_optimised_reference_is_the_best_multiple():
    oracle, level, c, _ = pair_at("vp", 0.3)
    at = {
        w: (
            p := guided_prediction(oracle, CFGZeroStar(w, zero_init=0), X, level, LABELS, None)[0]
        ).eps
        - p.x0
        for w in (0.0, 1.0)
    }
    v_c = c.eps - c.x0
    torch.testing.assert_close(
        ((v_c - at[0.0]) * at[0.0]).sum(1), torch.zeros(6).double(), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("schedule", (Flow(), Cosine(), Cosine(scaling="flow")), ids=str)
@pytest.mark.parametrize(("sampler", "each"), [(DDIM(), 1), (AlphaBlending(2), 2)], ids=str)
def test_zero_init_leaves_the_blending_coordinate_unchanged_at_one_evaluation(
    schedule, sampler, each
):
    oracle = mixture(process(schedule))
    knots = Trailing().knots(schedule, 6)
    x, used = integrate(oracle, sampler, X, knots[:3], NOISE, CFGZeroStar(3.0, zero_init=2), LABELS)
    z, start = (value / (k.alpha + k.sigma) for value, k in ((x, knots[2]), (X, knots[0])))
    torch.testing.assert_close(z, start, rtol=1e-12, atol=1e-12)
    assert used == 2 * each
    _, used = integrate(oracle, sampler, X, knots, NOISE, CFGZeroStar(3.0, zero_init=2), LABELS)
    assert used == each * (2 + 2 * 4)


def test_on_centred_gaussians_it_is_the_conditional_model():
    """v_c is a multiple of v_ref, so the variance is 1, where CFG has 2^(1-w)."""
    pair, noise = Pair(), Noise(torch.arange(3), (1,), dtype=torch.float64)
    knots, labels = Trailing().knots(pair.process.schedule, 200), torch.zeros(3, dtype=torch.int64)
    x, _ = integrate(
        pair, AlphaBlending(2), noise.start(), knots, noise, CFGZeroStar(4.0, zero_init=0), labels
    )
    torch.testing.assert_close((x / noise.start()) ** 2, torch.ones_like(x), rtol=2e-4, atol=0)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="zero_init is -1"):
        CFGZeroStar(3.0, zero_init=-1)


def test_zero_init_in_all_steps_costs_one_evaluation_each():
    grid = UniformLogSNR(-6.0, 6.0)
    made = sample(
        mixture(),
        grid=grid,
        steps=8,
        seeds=[1],
        condition=[0],
        guidance=CFGZeroStar(3.0, zero_init=8),
    )
    assert made.planned == made.evaluations == 8


@pytest.mark.parametrize("w", (0.0, 2.0))
def test_a_reference_without_velocity_counts_as_zero(w):
    """s = 0/0 at v_ref = 0; s v_ref is then 0, so that the velocity is w v."""
    level = Flow().at(0.4)
    conditional = Prediction(X, X.flip(0))
    reference = Prediction(X, X)  # ε - x_0 = 0
    step = Step(process(Flow()), level, level, level)
    inputs = GuidanceInput(level.alpha * X + level.sigma * X.flip(0), step, conditional, (), None)
    guided, _ = CFGZeroStar(w, zero_init=0).extrapolate(inputs, reference, w, None)
    torch.testing.assert_close(guided.eps - guided.x0, w * (X.flip(0) - X), rtol=1e-12, atol=1e-12)
