"""Every network output gives the same (x_0, ε), in every scaling, from λ = -inf to +inf."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffcore.core.prediction import edm_norm, log_gain, predict, target
from diffcore.schedules import Cosine
from tests.helpers.oracles import PREDICTION_TYPES, SCALINGS
from tests.helpers.products import sampled, thinned

LOGSNRS = [
    -math.inf,
    -170.0,
    -80.0,
    -40.0,
    -20.0,
    -10.0,
    -2.0,
    0.0,
    2.0,
    10.0,
    20.0,
    40.0,
    80.0,
    170.0,
    math.inf,
]
every_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
S = 0.5  # standard deviation of the data, for edm
x0, eps = torch.randn(2, 500, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(scaling, logsnr):
    return Cosine(scaling=scaling).at(logsnr)


def coefficients(prediction_type, alpha, sigma, s):
    """c with F = c[0] x_0 + c[1] ε, from the definition in each paper."""
    norm = math.hypot(alpha, sigma)
    u = sigma / alpha  # EDM's σ, in whose units its network sees x_0 + u ε
    c_skip, c_out = s**2 / (u**2 + s**2), u * s / math.sqrt(u**2 + s**2)
    return {
        "epsilon": (0, 1),
        "sample": (1, 0),
        "v_prediction": (-sigma / norm, alpha / norm),
        "flow_prediction": (-1, 1),
        "edm": ((1 - c_skip) / c_out, -c_skip * u / c_out),
    }[prediction_type]


@pytest.mark.parametrize(
    ("prediction_type", "scaling", "logsnr", "s"),
    sampled(
        PREDICTION_TYPES,
        SCALINGS,
        [-10.0, -3.0, -0.5, 0.0, 1.0, 4.0, 10.0],
        [0.5, 1.7],
        count=60,
    ),
)
def test_prediction_is_the_solution_of_the_papers_definitions(prediction_type, scaling, logsnr, s):
    level = at(scaling, logsnr)
    system = np.array(
        [[level.alpha, level.sigma], coefficients(prediction_type, level.alpha, level.sigma, s)]
    )
    F = target(prediction_type, x0, eps, level, s)
    np.testing.assert_allclose(F, system[1, 0] * x0 + system[1, 1] * eps, rtol=0, atol=1e-11)
    x = torch.randn(
        2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )  # any x and F, not a pair
    expected = np.linalg.solve(system, x.numpy())
    result = predict(prediction_type, x[1], x[0], level, s)
    np.testing.assert_allclose(result.x0, expected[0], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(result.eps, expected[1], rtol=1e-9, atol=1e-11)


def determined(logsnrs):
    """All combinations with a finite prediction: not ε at α = 0, x_0 at σ = 0, and σ = inf."""
    undetermined = {("epsilon", -math.inf), ("sample", math.inf)}
    cases = [
        (prediction_type, scaling, logsnr)
        for prediction_type, scaling, logsnr in itertools.product(
            PREDICTION_TYPES, SCALINGS, logsnrs
        )
        if (prediction_type, logsnr) not in undetermined and (scaling, logsnr) != ("ve", -math.inf)
    ]
    names = ("prediction_type", "scaling", "logsnr")
    return pytest.mark.parametrize(names, thinned(cases, len(cases) // 3))


def largest_errors(prediction_type, level, dtype):
    F, x = (
        target(prediction_type, x0, eps, level, S).to(dtype),
        (level.alpha * x0 + level.sigma * eps).to(dtype),
    )
    result = predict(prediction_type, F, x, level.to(x), S)
    assert result.x0.dtype == result.eps.dtype == dtype
    return (result.x0 - x0).abs().max().item(), (result.eps - eps).abs().max().item()


def amplification(prediction_type, logsnr):
    """The factors by which the division by α or σ amplifies the rounding error of x_0 and of ε.

    They are e^(-λ/2) for x_0 of epsilon and e^(λ/2) for ε of sample.
    """
    x0_factor = math.exp(max(0, -logsnr / 2)) if prediction_type == "epsilon" else 1
    eps_factor = math.exp(max(0, logsnr / 2)) if prediction_type == "sample" else 1
    return x0_factor, eps_factor


@determined(LOGSNRS)
def test_float32_predictions_are_accurate_from_noise_to_data(prediction_type, scaling, logsnr):
    """1e-6 is four ulp of the largest x_0 and ε here, which are near 4."""
    x0_error, eps_error = largest_errors(prediction_type, at(scaling, logsnr), torch.float32)
    x0_factor, eps_factor = amplification(prediction_type, logsnr)
    assert x0_error <= 1e-6 * x0_factor
    assert eps_error <= 1e-6 * eps_factor


@determined([value for value in LOGSNRS if value != -170])
def test_float32_predictions_are_accurate_with_a_level_per_sample(prediction_type, scaling, logsnr):
    level = at(scaling, torch.tensor([[[logsnr]]], dtype=torch.float64))
    x0_error, eps_error = largest_errors(prediction_type, level, torch.float32)
    x0_factor, eps_factor = amplification(prediction_type, logsnr)
    assert x0_error <= 1e-6 * x0_factor
    assert eps_error <= 1e-6 * eps_factor


# The square of a float32 σ overflows from λ = -88.7 in the ve scaling, σ itself from λ = -177.
@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction", "edm"])
def test_float32_levels_of_a_batch_are_accurate_at_lambda_minus_170_in_ve(prediction_type):
    level = at("ve", torch.tensor([[[-170.0]]], dtype=torch.float64))
    assert max(largest_errors(prediction_type, level, torch.float32)) <= 1e-6


@determined([value for value in LOGSNRS if abs(value) <= 20])
def test_float64_round_trips_to_1e_14(prediction_type, scaling, logsnr):
    x0_error, eps_error = largest_errors(prediction_type, at(scaling, logsnr), torch.float64)
    x0_factor, eps_factor = amplification(prediction_type, logsnr)
    assert x0_error <= 1e-14 * x0_factor
    assert eps_error <= 1e-14 * eps_factor


@pytest.mark.parametrize("logsnr", [-math.inf, -30.0, -1.0, 0.0, 5.0, math.inf])
def test_v_is_that_of_the_vp_process_in_every_scaling(logsnr):
    vp = at("vp", logsnr)
    v = vp.alpha * eps - vp.sigma * x0
    for scaling in ("vp", "flow") if logsnr == -math.inf else SCALINGS:
        level = at(scaling, logsnr)
        torch.testing.assert_close(target("v_prediction", x0, eps, level, S), v, rtol=0, atol=1e-14)
        result = predict("v_prediction", v, level.alpha * x0 + level.sigma * eps, level, S)
        torch.testing.assert_close(result.pair, (x0, eps), rtol=0, atol=1e-13)


def test_flow_prediction_is_the_velocity_of_the_straight_line():
    """x_t = (1-t) x_0 + t ε has the derivative ε - x_0 in t."""
    near, far = (at("flow", 2 * math.log((1 - t) / t)) for t in (0.3, 0.4))
    velocity = (far.alpha * x0 + far.sigma * eps - near.alpha * x0 - near.sigma * eps) / 0.1
    torch.testing.assert_close(
        target("flow_prediction", x0, eps, near, S), velocity, rtol=0, atol=1e-13
    )


@every_scaling
@pytest.mark.parametrize("logsnr", [-30.0, -1.0, 0.0, 5.0, math.inf])
def test_edm_on_unit_variance_data_is_minus_v(scaling, logsnr):
    level = at(scaling, logsnr)
    v = target("v_prediction", x0, eps, level, 1.0)
    torch.testing.assert_close(target("edm", x0, eps, level, 1.0), -v, rtol=0, atol=1e-14)
    x = level.alpha * x0 + level.sigma * eps
    ours, theirs = predict("edm", -v, x, level, 1.0), predict("v_prediction", v, x, level, 1.0)
    torch.testing.assert_close(ours.pair, theirs.pair, rtol=0, atol=1e-13)


@every_scaling
@pytest.mark.parametrize("logsnr", [-8.0, 0.0, 8.0])
def test_input_and_output_of_edm_have_unit_variance(scaling, logsnr):
    """c_in and c_out are chosen so that x / n and F have variance 1 for data of std s."""
    level, data = at(scaling, logsnr), S * x0
    x = (level.alpha * data + level.sigma * eps) / edm_norm(level, S)
    for value in (x, target("edm", data, eps, level, S)):
        assert value.square().mean().item() == pytest.approx(
            1, abs=0.11
        )  # 4 standard errors of 3000 squares


@every_prediction_type
@every_scaling
@pytest.mark.parametrize("logsnr", [-20.0, -3.0, 0.0, 2.0, 20.0])
def test_log_gain_is_the_squared_derivative_of_x0_by_the_output(prediction_type, scaling, logsnr):
    level, zero = at(scaling, logsnr), torch.zeros(1, dtype=torch.float64)
    slope = (
        predict(prediction_type, zero + 1, zero, level, S).x0
        - predict(prediction_type, zero, zero, level, S).x0
    )
    gain = log_gain(prediction_type, torch.tensor([logsnr], dtype=torch.float64), S)
    torch.testing.assert_close(gain, slope.square().log(), rtol=1e-10, atol=1e-12)


@every_prediction_type
def test_the_prediction_of_a_batch_uses_the_level_of_each_sample(prediction_type):
    logsnr = torch.linspace(-6, 6, 500, dtype=torch.float64)
    level = at("flow", logsnr.view(-1, 1, 1))
    F, x = eps.sin(), level.alpha * x0 + level.sigma * eps
    together = predict(prediction_type, F, x, level, S)
    for i in (0, 123, 499):
        alone = predict(prediction_type, F[i], x[i], at("flow", logsnr[i].item()), S)
        torch.testing.assert_close(together.x0[i], alone.x0, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(together.eps[i], alone.eps, rtol=1e-13, atol=1e-13)


@every_prediction_type
@every_scaling
def test_a_prediction_at_its_level_is_x_and_at_another_level_the_noisy_sample(
    prediction_type, scaling
):
    here, there = at(scaling, -1.0), at(scaling, 3.0)
    x, F = x0.cos(), eps.sin()  # any pair, not a consistent one
    result = predict(prediction_type, F, x, here, S)
    torch.testing.assert_close(result.at(here), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        result.at(there), there.alpha * result.x0 + there.sigma * result.eps, rtol=1e-14, atol=1e-14
    )


def test_the_error_of_an_unknown_prediction_type_lists_the_known_ones():
    level, known = (
        at("vp", 0.0),
        "prediction is 'eps', expected one of epsilon, sample, v_prediction, flow_predict",
    )
    with pytest.raises(ValueError, match=known):
        predict("eps", eps, x0, level, S)
    with pytest.raises(ValueError, match=known):
        target("eps", x0, eps, level, S)
    with pytest.raises(ValueError, match=known):
        log_gain("eps", eps, S)
