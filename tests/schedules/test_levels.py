"""α and σ of the three scalings, and levels of a schedule."""

import math

import pytest
import torch

from diffcore.schedules import Cosine, Discrete, Flow, Level, Shifted, alpha_sigma
from tests.helpers.schedules import all_scalings, all_schedules

LEVELS = torch.cat(
    (torch.linspace(-80, 80, 161, dtype=torch.float64), torch.tensor([-300.0, 300.0]))
)


def test_vp_and_flow_are_normalised_to_1e_15():
    levels = torch.cat((LEVELS, torch.tensor([-math.inf, math.inf])))
    alpha, sigma = alpha_sigma(levels, "vp")
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    alpha, sigma = alpha_sigma(levels, "flow")
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha), rtol=0, atol=1e-15)


@all_scalings
def test_lambda_is_the_log_of_the_squared_ratio(scaling):
    alpha, sigma = alpha_sigma(LEVELS, scaling)
    torch.testing.assert_close(2 * alpha.log() - 2 * sigma.log(), LEVELS, rtol=1e-14, atol=1e-14)


def test_alpha_and_sigma_are_equal_at_lambda_0():
    assert alpha_sigma(torch.zeros(1), "vp") == pytest.approx(
        (math.sqrt(0.5), math.sqrt(0.5)), rel=1e-7
    )
    assert alpha_sigma(torch.zeros(1), "flow") == (0.5, 0.5)
    assert alpha_sigma(torch.zeros(1), "ve") == (1, 1)


@pytest.mark.parametrize("scaling", ["vp", "flow"])
def test_infinite_levels_are_pure_data_and_pure_noise(scaling):
    alpha, sigma = alpha_sigma(torch.tensor([math.inf, -math.inf]), scaling)
    assert alpha.tolist() == [1, 0]
    assert sigma.tolist() == [0, 1]


def test_ve_has_alpha_1_and_is_clean_at_plus_infinity():
    alpha, sigma = alpha_sigma(torch.tensor([-3.0, math.inf]), "ve")
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == pytest.approx([math.exp(1.5), 0])


def test_sigma_is_right_in_float32_where_sqrt_of_1_minus_alpha_squared_is_0():
    alpha, sigma = alpha_sigma(torch.tensor([40.0]), "vp")
    assert (1 - alpha**2).sqrt() == 0
    assert sigma.item() == pytest.approx(math.exp(-20), rel=1e-6)


def test_an_unknown_scaling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"scaling is 'VP', expected one of vp, ve, flow"):
        alpha_sigma(torch.zeros(1), "VP")


def test_the_cleanest_entry_of_a_table_adds_noise_in_float32():
    x = torch.ones(1000)
    level = Discrete().level(torch.tensor([1 / 1000], dtype=torch.float64)).to(x)
    eps = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    noisy = level.alpha * x + level.sigma * eps
    # σ = √β_0 = 0.01; the standard deviation of 1000 draws is known to 2 %
    assert (noisy - x).std().item() == pytest.approx(0.01, rel=0.1)


@all_schedules
def test_level_at_a_time_and_at_its_lambda_are_one_level(schedule):
    for t in (0.007, 0.3, 0.77):
        level = schedule.level(t)
        logsnr = torch.tensor(schedule.logsnr(t), dtype=torch.float64)
        alpha, sigma = (value.item() for value in alpha_sigma(logsnr, schedule.scaling))
        assert (level.t, level.alpha, level.sigma, level.schedule) == (t, alpha, sigma, schedule)
        for other in (schedule.at(level.logsnr), schedule.at_blend(level.blend)):
            values = (other.logsnr, other.t, other.alpha, other.sigma)
            assert values == pytest.approx(
                (level.logsnr, level.t, level.alpha, level.sigma), rel=1e-10
            )


@all_scalings
def test_blend_and_ratio_are_functions_of_lambda_alone(scaling):
    logsnr = torch.tensor([-9.0, 0.0, 2.5, 30.0], dtype=torch.float64)
    schedule = Cosine(scaling=scaling)
    level = schedule.at(logsnr)
    torch.testing.assert_close(level.ratio, level.sigma / level.alpha, rtol=1e-14, atol=0)
    torch.testing.assert_close(level.blend, 1 / (1 + (logsnr / 2).exp()), rtol=1e-14, atol=0)
    for value, blend in zip(logsnr.tolist(), level.blend.tolist(), strict=True):
        assert schedule.at(value).ratio == pytest.approx(math.exp(-value / 2), rel=1e-14)
        assert schedule.at(value).blend == pytest.approx(blend, rel=1e-14)


@pytest.mark.parametrize("scaling", ["vp", "flow"])
def test_blend_and_ratio_are_defined_at_both_ends(scaling):
    schedule = Cosine(scaling=scaling)
    noise, clean = schedule.level(1.0), schedule.level(0.0)
    assert (noise.blend, noise.ratio) == (1, math.inf)
    assert (clean.blend, clean.ratio) == (0, 0)
    assert schedule.at_blend(1.0).logsnr == -math.inf
    assert schedule.at_blend(0.0).logsnr == math.inf


def test_a_level_is_cast_to_the_dtype_of_x_and_keeps_floats():
    x = torch.zeros(2, 1, 4, dtype=torch.bfloat16)
    level = Flow().level(torch.tensor([[[0.25]], [[0.75]]], dtype=torch.float64))
    cast = level.to(x)
    for name in ("logsnr", "t", "alpha", "sigma"):
        assert torch.equal(getattr(cast, name), getattr(level, name).bfloat16())
    assert cast.schedule == level.schedule
    number = Flow().level(0.25)
    assert number.to(x) == number == Level(2 * math.log(3), 0.25, 0.75, 0.25, Flow())


def test_the_range_of_lambda_of_a_level_is_that_of_its_tensor_or_twice_its_number():
    levels = Flow().at(torch.tensor([[1.0, -2.0], [3.5, 0.0]], dtype=torch.float64))
    assert levels.logsnr_range == (-2.0, 3.5)
    assert Flow().at(1.0).logsnr_range == (1.0, 1.0)


@pytest.mark.parametrize("t", [-1e-9, 1.0001, math.nan])
@pytest.mark.parametrize("schedule", [Cosine(), Discrete(), Shifted(Flow(), 1.0)], ids=repr)
def test_times_outside_0_and_1_are_refused(schedule, t):
    with pytest.raises(ValueError, match=r"t is .*expected times within \[0, 1\]"):
        schedule.logsnr(t)
    with pytest.raises(ValueError, match="expected times within"):
        schedule.level(torch.tensor([0.5, t]))
