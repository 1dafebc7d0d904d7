"""Guidance rescale: the formula of Lin et al. on the output of the network, and its limits."""

import math
from typing import get_args

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, PredictionType
from diffcore.guidance import CFG, ClassifierGuidance, GuidanceInput, Interval, Rescale, Step
from diffcore.samplers import AlphaBlending
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Trailing
from tests.helpers.oracles import ExactNetwork, Pair, mixture, process

NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
X, LABELS, NULL = 2 * NOISE.start(), torch.tensor([0, 1, 1, 0, 1, 0]), torch.full((6,), 2)


@pytest.mark.parametrize("phi", (0.0, 0.7, 1.0))
@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_rescale_is_the_published_formula_on_the_output_of_the_network(kind, phi):
    """Diffusers' code on raw outputs, converted to x_0 by formulas that are written out here."""
    record = process(prediction=kind)
    network, level = ExactNetwork(mixture(record), record), record.schedule.at(-0.7)
    guided, _, _ = guided_prediction(
        Denoiser(network, record), Rescale(CFG(6.0), phi), X, level, LABELS, None
    )
    time, scaled = torch.full((6,), 1000 * level.t - 1, dtype=torch.float64), X
    s, norm = record.sigma_data, math.hypot(level.sigma, level.alpha * record.sigma_data)
    if kind == "edm":
        scaled = X / norm
    F_c, F_u = network(scaled, time, LABELS), network(scaled, time, NULL)
    F = rescale_noise_cfg(F_u + 6 * (F_c - F_u), F_c, phi)
    expected = {
        "epsilon": (X - level.sigma * F) / level.alpha,
        "sample": F,
        "v_prediction": level.alpha * X - level.sigma * F,
        "flow_prediction": (X - level.sigma * F) / (level.alpha + level.sigma),
        "edm": level.alpha * s**2 / norm**2 * X + level.sigma * s / norm * F,
    }[kind]
    torch.testing.assert_close(guided.x0, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(guided.at(level), X, rtol=1e-9, atol=1e-9)


def test_a_stated_space_does_not_depend_on_the_network():
    results = []
    for kind in get_args(PredictionType):
        record = process(prediction=kind)
        network, level = (
            Denoiser(ExactNetwork(mixture(record), record), record),
            record.schedule.at(0.5),
        )
        results.append(
            guided_prediction(
                network, Rescale(CFG(6.0), space="v_prediction"), X, level, LABELS, None
            )[0].x0
        )
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-9)


def test_phi_1_gives_each_sample_the_deviation_of_the_conditional_output():
    oracle = mixture(process(prediction="sample"))
    level = oracle.process.schedule.at(-1.0)
    guided, _, _ = guided_prediction(oracle, Rescale(CFG(9.0), 1.0), X, level, LABELS, None)
    torch.testing.assert_close(
        guided.x0.std(1), oracle(X, level, LABELS).x0.std(1), rtol=1e-9, atol=0
    )


def test_a_constant_sample_stays_unchanged():
    record = process(prediction="sample")
    level = record.schedule.at(0.0)
    cond, ref = torch.tensor([[1.0, 3.0], [1.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    zero = torch.zeros_like(cond)
    inputs = GuidanceInput(
        zero, Step(record, level, level, level), Prediction(cond, zero), (Prediction(ref, zero),)
    )
    guided, _ = Rescale(CFG(2.0), 1.0).combine(
        inputs, None
    )  # 2 (1, 3) - (0, 4) = (2, 2): no deviation
    torch.testing.assert_close(guided.x0, torch.tensor([[2.0, 2.0], [2.0, 3.0]]))


def test_outside_an_interval_inside_it_nothing_is_rescaled():
    oracle, level = mixture(), process().schedule.at(0.0)
    rule = Rescale(Interval(CFG(5.0), sigma=(2.0, 3.0)), 1.0)
    guided, _, evaluations = guided_prediction(oracle, rule, X, level, LABELS, None)
    assert evaluations == 1
    assert torch.equal(guided.x0, oracle(X, level, LABELS).x0)


def test_phi_1_on_centred_gaussians_of_equal_shape_is_the_conditional_model():
    """Each output is a multiple of x, so guidance changes only its size. Variances 1 and 2."""
    noise, labels = (
        Noise(torch.arange(3), (1,), dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
    )
    pair = Pair()

    class Twice:
        """Two independent copies of the pair."""

        process = process(pair.process.schedule, shape=(2,), classes=1)

        def __call__(self, x, level, condition=None):
            null = (condition == 1)[:, None]
            alpha, sigma = level.alpha, level.sigma
            v = torch.where(null, 2.0, 1.0)
            total = alpha**2 * v + sigma**2
            return Prediction(alpha * v / total * x, sigma / total * x)

    noise = Noise(torch.arange(3), (2,), dtype=torch.float64)
    rule = Rescale(CFG(4.0), 1.0)
    knots = insert_levels(Trailing().knots(pair.process.schedule, 200), ())
    x, _ = integrate(Twice(), AlphaBlending(2), noise.start(), knots, noise, rule, labels)
    plain, _ = integrate(Twice(), AlphaBlending(2), noise.start(), knots, noise, CFG(1.0), labels)
    guided_alone, _ = integrate(
        Twice(), AlphaBlending(2), noise.start(), knots, noise, CFG(4.0), labels
    )
    agree = (x - plain).norm() / plain.norm()
    assert agree < (guided_alone - plain).norm() / plain.norm() / 3


@pytest.mark.parametrize(
    "rule", (CFG(3.0), ClassifierGuidance(lambda x, level: x, 2.0, input="x0")), ids=("cfg", "x0")
)
def test_eps_at_pure_noise_and_x0_at_clean_data_cannot_be_rescaled(rule):
    """x_0 = (x - σ ε)/α with α = 0 there, and ε = (x - α x_0)/σ with σ = 0."""
    arguments = {"steps": 3, "seeds": [1], "condition": [0], "batch_size": 1}
    with pytest.raises(ValueError, match=r"works on epsilon.* λ = -inf: use space='v_prediction'"):
        sample(mixture(), guidance=Rescale(rule, space="epsilon"), **arguments)
    late = Rescale(Interval(rule, sigma=(0.1, 9.0)), space="epsilon")  # not at pure noise
    assert sample(mixture(), guidance=late, **arguments).x.isfinite().all()
    *_, noisy, clean = Trailing().knots(process().schedule, 3)
    with pytest.raises(ValueError, match="works on sample"):
        integrate(
            mixture(),
            AlphaBlending(1),
            X,
            (clean, noisy),
            NOISE,
            Rescale(CFG(3.0), space="sample"),
            LABELS,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phi": -0.1}, "phi is -0.1"),
        ({"phi": math.nan}, "phi is nan"),
        ({"space": "score"}, "space is 'score'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rescale(CFG(2.0), **arguments)
