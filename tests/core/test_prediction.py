"""Every network output gives the same (x_0, ε), in every scaling, from λ = -inf to +inf."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffcore.core.prediction import Prediction, edm_norm, log_gain, predict, target
from diffcore.schedules import Cosine

KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]
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
every_kind = pytest.mark.parametrize("kind", KINDS)
every_scaling = pytest.mark.parametrize("scaling", ["vp", "flow", "ve"])
S = 0.5  # standard deviation of the data, for edm
x0, eps = torch.randn(2, 500, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(scaling, logsnr):
    return Cosine(scaling=scaling).at(logsnr)


def rows(kind, alpha, sigma, s):
    """c with F = c[0] x_0 + c[1] ε, from each paper's definition."""
    norm = math.hypot(alpha, sigma)
    u = sigma / alpha  # EDM's σ, in whose units its network sees x_0 + u ε
    c_skip, c_out = s**2 / (u**2 + s**2), u * s / math.sqrt(u**2 + s**2)
    return {
        "epsilon": (0, 1),
        "sample": (1, 0),
        "v_prediction": (-sigma / norm, alpha / norm),
        "flow_prediction": (-1, 1),
        "edm": ((1 - c_skip) / c_out, -c_skip * u / c_out),
    }[kind]


@every_kind
@every_scaling
@pytest.mark.parametrize("logsnr", [-10.0, -3.0, -0.5, 0.0, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("s", [0.5, 1.7])
def test_prediction_is_the_solution_of_the_papers_definitions(kind, scaling, logsnr, s):
    level = at(scaling, logsnr)
    system = np.array([[level.alpha, level.sigma], rows(kind, level.alpha, level.sigma, s)])
    F = target(kind, x0, eps, level, s)
    np.testing.assert_allclose(F, system[1, 0] * x0 + system[1, 1] * eps, rtol=0, atol=1e-11)
    x = torch.randn(
        2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )  # any x and F, not a pair
    expected = np.linalg.solve(system, x.numpy())
    found = predict(kind, x[1], x[0], level, s)
    np.testing.assert_allclose(found.x0, expected[0], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.eps, expected[1], rtol=1e-9, atol=1e-11)


def knowable(logsnrs):
    """All combinations but those that no formula can answer: ε at α = 0, x_0 at σ = 0, and σ = inf."""
    unknowable = {("epsilon", -math.inf), ("sample", math.inf)}
    cases = [
        (kind, scaling, logsnr)
        for kind, scaling, logsnr in itertools.product(KINDS, ("vp", "flow", "ve"), logsnrs)
        if (kind, logsnr) not in unknowable and (scaling, logsnr) != ("ve", -math.inf)
    ]
    return pytest.mark.parametrize(("kind", "scaling", "logsnr"), cases)


def largest_errors(kind, level, dtype):
    F, x = (
        target(kind, x0, eps, level, S).to(dtype),
        (level.alpha * x0 + level.sigma * eps).to(dtype),
    )
    found = predict(kind, F, x, level.to(x), S)
    assert found.x0.dtype == found.eps.dtype == dtype
    return (found.x0 - x0).abs().max().item(), (found.eps - eps).abs().max().item()


def lost(kind, logsnr):
    """What the division by α or σ of the other quantity costs: e^(-λ/2) for epsilon's x_0, e^(λ/2)
    for sample's ε.
    """
    x0_factor = math.exp(max(0, -logsnr / 2)) if kind == "epsilon" else 1
    eps_factor = math.exp(max(0, logsnr / 2)) if kind == "sample" else 1
    return x0_factor, eps_factor


@knowable(LOGSNRS)
def test_float32_keeps_its_digits_from_noise_to_data(kind, scaling, logsnr):
    """1e-6 is four ulp of the largest x_0 and ε here, which are near 4; numerics.md, fact 9."""
    x0_error, eps_error = largest_errors(kind, at(scaling, logsnr), torch.float32)
    x0_factor, eps_factor = lost(kind, logsnr)
    assert x0_error <= 1e-6 * x0_factor
    assert eps_error <= 1e-6 * eps_factor


@knowable([value for value in LOGSNRS if value != -170])
def test_float32_levels_of_a_batch_keep_their_digits_too(kind, scaling, logsnr):
    level = at(scaling, torch.tensor([[[logsnr]]], dtype=torch.float64))
    x0_error, eps_error = largest_errors(kind, level, torch.float32)
    x0_factor, eps_factor = lost(kind, logsnr)
    assert x0_error <= 1e-6 * x0_factor
    assert eps_error <= 1e-6 * eps_factor


# Wrong: v_prediction and edm square a float32 σ, which overflows from λ = -88.7 in the ve scaling
# (σ itself from -177), and answer with x_0 = ε = 0 or so, an error of 4, where flow_prediction is
# right.
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction", "edm"])
def test_float32_levels_of_a_batch_reach_minus_170_in_ve(kind):
    level = at("ve", torch.tensor([[[-170.0]]], dtype=torch.float64))
    assert max(largest_errors(kind, level, torch.float32)) <= 1e-6


@knowable([value for value in LOGSNRS if abs(value) <= 20])
def test_float64_round_trips_to_1e_14(kind, scaling, logsnr):
    x0_error, eps_error = largest_errors(kind, at(scaling, logsnr), torch.float64)
    x0_factor, eps_factor = lost(kind, logsnr)
    assert x0_error <= 1e-14 * x0_factor
    assert eps_error <= 1e-14 * eps_factor


@pytest.mark.parametrize("logsnr", [-math.inf, -30.0, -1.0, 0.0, 5.0, math.inf])
def test_v_is_the_vp_process_in_every_scaling(logsnr):
    vp = at("vp", logsnr)
    v = vp.alpha * eps - vp.sigma * x0
    for scaling in ("vp", "flow") if logsnr == -math.inf else ("vp", "flow", "ve"):
        level = at(scaling, logsnr)
        torch.testing.assert_close(target("v_prediction", x0, eps, level, S), v, rtol=0, atol=1e-14)
        found = predict("v_prediction", v, level.alpha * x0 + level.sigma * eps, level, S)
        torch.testing.assert_close(found, Prediction(x0, eps), rtol=0, atol=1e-13)


def test_flow_prediction_is_the_velocity_of_the_straight_line():
    """x_t = (1-t) x_0 + t ε moves by ε - x_0 a unit of t."""
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
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@every_scaling
@pytest.mark.parametrize("logsnr", [-8.0, 0.0, 8.0])
def test_edm_sees_and_outputs_unit_variance(scaling, logsnr):
    """What c_in and c_out are for: data of std s, x / n and F all have variance 1."""
    level, data = at(scaling, logsnr), S * x0
    x = (level.alpha * data + level.sigma * eps) / edm_norm(level, S)
    for value in (x, target("edm", data, eps, level, S)):
        assert value.square().mean().item() == pytest.approx(
            1, abs=0.11
        )  # 4 standard errors of 3000 squares


@every_kind
@every_scaling
@pytest.mark.parametrize("logsnr", [-20.0, -3.0, 0.0, 2.0, 20.0])
def test_log_gain_is_the_squared_derivative_of_x0_by_the_output(kind, scaling, logsnr):
    level, zero = at(scaling, logsnr), torch.zeros(1, dtype=torch.float64)
    slope = predict(kind, zero + 1, zero, level, S).x0 - predict(kind, zero, zero, level, S).x0
    gain = log_gain(kind, torch.tensor([logsnr], dtype=torch.float64), S)
    torch.testing.assert_close(gain, slope.square().log(), rtol=1e-10, atol=1e-12)


@every_kind
def test_a_map_of_levels_is_each_level_on_its_own_sample(kind):
    logsnr = torch.linspace(-6, 6, 500, dtype=torch.float64)
    level = at("flow", logsnr.view(-1, 1, 1))
    F, x = eps.sin(), level.alpha * x0 + level.sigma * eps
    together = predict(kind, F, x, level, S)
    for i in (0, 123, 499):
        alone = predict(kind, F[i], x[i], at("flow", logsnr[i].item()), S)
        torch.testing.assert_close(together.x0[i], alone.x0, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(together.eps[i], alone.eps, rtol=1e-13, atol=1e-13)


@every_kind
@every_scaling
def test_a_prediction_at_its_own_level_is_x_and_at_another_the_mixture_there(kind, scaling):
    here, there = at(scaling, -1.0), at(scaling, 3.0)
    x, F = x0.cos(), eps.sin()  # any pair, not a consistent one
    found = predict(kind, F, x, here, S)
    torch.testing.assert_close(found.at(here), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        found.at(there), there.alpha * found.x0 + there.sigma * found.eps, rtol=1e-14, atol=1e-14
    )


def test_unknown_kinds_are_refused_with_the_known_ones():
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
