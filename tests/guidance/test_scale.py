"""Scales over λ: their values, and every rule reads them at the level of the evaluation."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.guidance import (
    APG,
    CFG,
    GFCG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    ComposedConditions,
    ConstantScale,
    CosineScale,
    LinearScale,
    ScaledConditions,
    Step,
)
from diffcore.guidance.classifier import GFCGMemory
from diffcore.guidance.scale import scale_at
from diffcore.io.specs import to_spec
from diffcore.samplers import AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Trailing
from tests.helpers.oracles import Pair, mixture

LABELS = torch.tensor([0, 1, 1])
X = 2 * Noise(torch.arange(3), (2,), dtype=torch.float64).start()


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        (ConstantScale(2.5), [2.5] * 7),
        (LinearScale(1.0, 5.0, -4.0, 4.0), [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0]),
        (
            CosineScale(5.0, 1.0, -4.0, 4.0),
            [5.0, 5.0, 5 - 4 * (1 - math.sqrt(0.5)) / 2, 3.0, None, 1.0, 1.0],
        ),
    ],
    ids=str,
)
def test_a_scale_has_the_values_of_its_formula(scale, values):
    for logsnr, value in zip((-math.inf, -4.0, -2.0, 0.0, 2.0, 4.0, math.inf), values, strict=True):
        assert value is None or scale(logsnr) == pytest.approx(value)


MAKE_RULE = {
    "CFG": CFG,
    "APG": APG,
    "CFGZeroStar": partial(CFGZeroStar, zero_init=0),
    "CFGPlusPlus": CFGPlusPlus,
    "ComposedConditions": lambda scale: ComposedConditions((1,), (0.5,), scale),
    "ScaledConditions": lambda scale: ScaledConditions(("label",), (scale,)),
    "ClassifierGuidance": lambda scale: ClassifierGuidance(lambda x, level: x, scale),
    "GFCG": lambda scale: GFCG(lambda x0, level: x0, scale),
}


@pytest.mark.parametrize("rule", MAKE_RULE.values(), ids=MAKE_RULE.keys())
@pytest.mark.parametrize("logsnr", (-2.0, 0.5))
def test_a_schedule_is_its_value_at_the_level(rule, logsnr):
    oracle, scale = mixture(), LinearScale(0.2, 0.6, -4.0, 4.0)
    schedule = oracle.process.schedule
    start, level, end = schedule.at(-3.0), schedule.at(logsnr), schedule.at(3.0)
    step, memory = (
        Step(oracle.process, level, start, end, 1, 3),
        GFCGMemory(1 - LABELS, torch.ones(3)),
    )
    results = [
        guided_prediction(
            oracle, rule(w), X, level, LABELS, memory if rule is MAKE_RULE["GFCG"] else None, step
        )[0].x0
        for w in (scale, scale(logsnr), scale(logsnr) + 0.1)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not torch.allclose(results[0], results[2])


def test_levels_of_scale_1_cost_one_evaluation():
    made = sample(
        mixture(),
        steps=10,
        seeds=[1],
        condition=[0],
        guidance=CFG(lambda logsnr: 3.0 if logsnr > 0 else 1.0),
    )
    noisy = sum(knot.logsnr <= 0 for knot in made.knots[:-1])
    assert made.evaluations == made.planned == 10 + 10 - noisy


def test_exact_variance_with_a_scale_over_lambda_on_two_gaussians():
    """d ln y/d ln(u²) = w/2 u²/(1+u²) + (1-w)/2 u²/(2+u²), integrated by quadrature over λ."""
    from scipy.integrate import quad

    scale, pair = CosineScale(1.0, 4.0, -3.0, 3.0), Pair()

    def rate(logsnr):  # -d ln y² / dλ beyond the conditional model
        v = math.exp(-logsnr)
        return (scale(logsnr) - 1) * (v / (1 + v) - v / (2 + v))

    expected = math.exp(-quad(rate, -40, 40, points=[-3, 3], limit=200)[0])
    noise, labels = (
        Noise(torch.arange(3), (1,), dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
    )
    knots = Trailing().knots(pair.process.schedule, 200)
    x, _ = integrate(pair, AlphaBlending(2), noise.start(), knots, noise, CFG(scale), labels)
    torch.testing.assert_close(
        (x / noise.start()) ** 2, torch.full_like(x, expected), rtol=3e-4, atol=0
    )


@pytest.mark.parametrize("value", (-1.0, math.nan, math.inf))
def test_wrong_scales_are_refused_at_construction_or_before_the_first_step(value):
    for make in (ConstantScale, CFG, lambda w: LinearScale(w, 1.0), lambda w: CosineScale(1.0, w)):
        with pytest.raises(ValueError, match="scale is"):
            make(value)
    with pytest.raises(ValueError, match=r"scale is .* at λ = -inf"):
        sample(mixture(), steps=2, seeds=[1], condition=[0], guidance=CFG(lambda logsnr: value))
    with pytest.raises(ValueError, match="scale is 'much'"):
        CFG("much")
    for make in (CFG, CFGPlusPlus, lambda scale: ComposedConditions((1,), (1.0,), scale)):
        with pytest.raises(ValueError, match="scale is <class"):
            make(CosineScale)
    with pytest.raises(ValueError, match="scale is 'much'"):
        CFGPlusPlus("much")
    for make in (ConstantScale, lambda w: LinearScale(w, 1.0)):
        with pytest.raises(ValueError, match="expected a finite w"):
            make(abs)


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-math.inf, 0.0), (math.nan, 1.0)]
)
def test_wrong_ramps_are_refused(low, high):
    with pytest.raises(ValueError, match="low < high"):
        LinearScale(1.0, 2.0, low, high)


@pytest.mark.parametrize("number", (np.float32(2), np.float64(2), np.int64(2)), ids=repr)
def test_a_scale_may_be_a_number_of_numpy(number):
    assert scale_at(number, mixture().process.schedule.at(0.0)) == 2.0
    for make in (CFG, ConstantScale, CFGPlusPlus, *MAKE_RULE.values()):
        make(number / 4)
    assert json.loads(json.dumps(to_spec(CFG(number))))["init_args"]["scale"] == 2.0


def test_the_rule_of_a_compiled_step_has_the_scale_of_the_level_of_its_evaluation():
    schedule = mixture().process.schedule
    start, level, end = (schedule.at(logsnr) for logsnr in (-3.0, 1.0, 2.0))
    scale = LinearScale(1.0, 5.0, -4.0, 4.0)
    for rule in (CFG(scale), APG(scale)):
        traced = rule.traceable(Step(mixture().process, level, start, end))
        assert float(traced.scale) == scale(1.0) != scale(-3.0)
    assert CFG(2.0).traceable(Step(mixture().process, level, start, end)) == CFG(2.0)


def test_references_are_required_by_the_scale_at_the_level_of_the_evaluation():
    schedule = mixture().process.schedule
    start, level, end = (schedule.at(logsnr) for logsnr in (-3.0, 4.0, 5.0))
    step = Step(mixture().process, level, start, end)
    for first, last, count in ((5.0, 1.0, 0), (1.0, 5.0, 1)):  # w = 1 needs none
        rule = CFG(LinearScale(first, last, -4.0, 4.0))
        assert len(rule.required_references(step, None)) == count
    after = Step(mixture().process, schedule.at(-4.0), level, end)
    assert not CFG(LinearScale(1.0, 5.0, -4.0, 4.0)).required_references(after, None)
