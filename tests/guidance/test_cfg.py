"""Classifier-free guidance: its formula, its two ends, and exact moments on Gaussians."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, PredictionType
from diffcore.guidance import CFG, GuidanceInput, Step
from diffcore.samplers import DDIM, AlphaBlending
from diffcore.sampling.loop import guided_prediction, integrate
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from tests.helpers.oracles import SCALINGS, ExactNetwork, Pair, mixture, process

NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)
X, LABELS, NULL = 2 * NOISE.start(), torch.tensor([0, 1, 1, 0, 1, 0]), torch.full((6,), 2)


@pytest.mark.parametrize("w", (0.0, 0.5, 1.5, 7.5))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_guided_is_the_reference_plus_w_times_the_difference_in_x0_and_eps(scaling, w):
    oracle = mixture(process(Cosine(scaling=scaling)))
    level = oracle.process.schedule.at(-0.5)
    guided, memory, evaluations = guided_prediction(oracle, CFG(w), X, level, LABELS, "kept")
    conditional, reference = oracle(X, level, LABELS), oracle(X, level)
    for result, ref, cond in zip(guided, reference, conditional, strict=True):
        torch.testing.assert_close(result, ref + w * (cond - ref), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        level.alpha * guided.x0 + level.sigma * guided.eps, X, rtol=1e-11, atol=1e-11
    )
    assert (memory, evaluations) == ("kept", 2)


def test_combine_extrapolates_from_the_reference_to_the_conditional():
    one, two = (
        Prediction(torch.tensor([a]), torch.tensor([b])) for a, b in ((3.0, 5.0), (1.0, 2.0))
    )
    level = Cosine().at(0.0)
    inputs = GuidanceInput(torch.zeros(1), Step(process(), level, level, level), one, (two,))
    guided, memory = CFG(2.0).combine(inputs, None)
    assert (guided.x0.item(), guided.eps.item(), memory) == (5.0, 8.0, None)


@pytest.mark.parametrize("condition", (LABELS, None))
def test_w_1_is_the_conditional_model_bit_for_bit_at_one_evaluation(condition):
    oracle = mixture()
    network = ExactNetwork(oracle, oracle.process)
    denoiser, level = Denoiser(network, oracle.process), oracle.process.schedule.at(0.3)
    guided, _, evaluations = guided_prediction(denoiser, CFG(1.0), X, level, condition, None)
    assert evaluations == len(network.calls) == 1
    assert len(network.calls[0][0]) == len(X)
    assert all(
        torch.equal(a, b) for a, b in zip(guided, denoiser(X, level, condition), strict=True)
    )


def test_w_0_is_the_reference_bit_for_bit():
    oracle = mixture()
    level = oracle.process.schedule.at(0.3)
    guided, _, _ = guided_prediction(oracle, CFG(0.0), X, level, LABELS, None)
    assert all(torch.equal(a, b) for a, b in zip(guided, oracle(X, level, NULL), strict=True))


def test_one_forward_has_the_conditional_samples_then_those_of_the_null_label():
    oracle = mixture()
    network = ExactNetwork(oracle, oracle.process)
    guided_prediction(
        Denoiser(network, oracle.process),
        CFG(3.0),
        X,
        oracle.process.schedule.at(0.0),
        LABELS,
        None,
    )
    ((x, _, labels),) = network.calls
    assert torch.equal(x, torch.cat((X, X)))
    assert torch.equal(labels, torch.cat((LABELS, NULL)))


@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_cfg_does_not_depend_on_the_prediction_type(prediction):
    """The rule and the conversions are affine, so guiding raw outputs gives the same result."""
    record = process(prediction=prediction)
    oracle = mixture(record)
    level = record.schedule.at(-1.0)
    guided, _, _ = guided_prediction(
        Denoiser(ExactNetwork(oracle, record), record), CFG(3.0), X, level, LABELS, None
    )
    expected, _, _ = guided_prediction(oracle, CFG(3.0), X, level, LABELS, None)
    torch.testing.assert_close(guided.x0, expected.x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(guided.eps, expected.eps, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("w", (0.0, 0.5, 1.0, 2.0, 4.0))
def test_cfg_on_two_gaussians_has_variance_2_to_the_1_minus_w(w):
    """The guided flow multiplies pure noise by √(2^(1-w)); second order in 1/200 errs by 1e-4."""
    noise = Noise(torch.arange(3), (1,), dtype=torch.float64)
    knots, labels = Trailing().knots(Flow(), 200), torch.zeros(3, dtype=torch.int64)
    x, evaluations = integrate(
        Pair(), AlphaBlending(2), noise.start(), knots, noise, CFG(w), labels
    )
    torch.testing.assert_close(
        (x / noise.start()) ** 2, torch.full_like(x, 2 ** (1 - w)), rtol=2e-4, atol=0
    )
    assert evaluations == 400 * (1 if w == 1 else 2)


def variance_with_fresh_noise(w, n):
    """The variance after n steps of DDIM(1), x_s = A x + B z, from unit variance at λ = -12."""
    schedule, labels = Flow(), torch.zeros(2, dtype=torch.int64)
    knots = Explicit(tuple(-12 + 24 * i / n for i in range(n + 1))).knots(schedule, n)
    z = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    unit = SimpleNamespace(between=lambda t, s, step: z)
    x, variance = z.flip(0), knots[0].sigma ** 2 + knots[0].alpha ** 2
    for t, s in pairwise(knots):
        prediction, _, _ = guided_prediction(Pair(), CFG(w), x, t, labels, None)
        A, B = (
            DDIM(1.0)
            .advance(DDIM(1.0).start(x, (t, s), unit), prediction, unit)
            .x.flatten()
            .tolist()
        )
        variance = A**2 * variance + B**2
    return variance / knots[-1].alpha ** 2


@pytest.mark.parametrize("w", (1.0, 2.0, 4.0))
def test_cfg_with_fresh_noise_has_the_variance_of_the_guided_sde(w):
    """Extrapolated to step size 0; 2e-3 covers the second order (1e-3) and the end at λ = 12."""
    variance = 2 * variance_with_fresh_noise(w, 400) - variance_with_fresh_noise(w, 200)
    assert variance == pytest.approx((2 - 2 ** (2 - 2 * w)) / (2 * w - 1), rel=2e-3)


@pytest.mark.parametrize("w", (-0.5, math.nan, math.inf, -math.inf))
def test_negative_and_non_finite_scales_are_refused(w):
    with pytest.raises(ValueError, match="scale is"):
        CFG(w)
