"""Closed-form schedules against their published formulas and the distributions of scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffcore.schedules import Cauchy, Cosine, Flow, Laplace, LogLinear, Normal, Rho
from diffcore.schedules.distributions import Distribution
from tests.helpers.schedules import concrete_classes

t = np.linspace(0.0005, 0.9995, 1000)
FORMULAS = [
    (Cosine(), 2 * np.log(1 / np.tan(np.pi * t / 2)), stats.hypsecant(scale=2)),
    (Flow(), 2 * np.log((1 - t) / t), stats.logistic(scale=2)),
    (Laplace(), -0.5 * np.sign(0.5 - t) * np.log(1 - 2 * abs(t - 0.5)), stats.laplace(0, 0.5)),
    (
        Laplace(1.5, 2.5),
        1.5 - 2.5 * np.sign(0.5 - t) * np.log(1 - 2 * abs(t - 0.5)),
        stats.laplace(1.5, 2.5),
    ),
    (Normal(), 2 * stats.norm.ppf(1 - t), stats.norm(0, 2)),
    (Cosine(0.5, 2.0), 0.5 + 2 / 2 * np.log(1 / np.tan(np.pi * t / 2)), stats.hypsecant(0.5, 1)),
    (Cosine(-1.0, 0.5), -1 + 2 / 0.5 * np.log(1 / np.tan(np.pi * t / 2)), stats.hypsecant(-1, 4)),
    (Cauchy(0.5, 0.7), 0.5 + 0.7 * np.tan(np.pi / 2 * (1 - 2 * t)), stats.cauchy(0.5, 0.7)),
    (LogLinear(-5.0, 13.3), 13.3 + t * (-5 - 13.3), stats.uniform(-5, 18.3)),
    (Normal(2.4, 1.2), 2.4 + 1.2 * stats.norm.ppf(1 - t), stats.norm(2.4, 1.2)),
]
"""Schedules with λ(t) as published, and the distribution of λ."""
all_formulas = pytest.mark.parametrize(
    ("schedule", "logsnr", "distribution"), FORMULAS, ids=lambda value: repr(value)[:24]
)


def test_the_formula_of_each_distribution_is_tested():
    """Rho is tested against the grid of EDM."""
    distributions = {
        cls
        for cls in concrete_classes(Distribution)
        if cls.__module__ == "diffcore.schedules.distributions"
    }
    assert {type(schedule) for schedule, _, _ in FORMULAS} == distributions - {Rho}


@all_formulas
def test_lambda_is_the_published_formula(schedule, logsnr, distribution):
    np.testing.assert_allclose(schedule.logsnr(torch.from_numpy(t)), logsnr, rtol=1e-11, atol=1e-12)


@all_formulas
def test_density_cdf_and_quantile_are_those_of_the_distribution(schedule, logsnr, distribution):
    grid = np.linspace(-15, 15, 301)
    np.testing.assert_allclose(
        schedule.density(torch.from_numpy(grid)), distribution.pdf(grid), rtol=1e-11
    )
    np.testing.assert_allclose(
        schedule.cdf(torch.from_numpy(grid)), distribution.cdf(grid), rtol=0, atol=1e-14
    )
    np.testing.assert_allclose(
        schedule.time(torch.from_numpy(grid)), distribution.sf(grid), rtol=1e-10, atol=1e-300
    )
    np.testing.assert_allclose(
        schedule.quantile(torch.from_numpy(t)), distribution.ppf(t), rtol=1e-9, atol=1e-12
    )


@all_formulas
def test_drawn_levels_pass_a_kolmogorov_smirnov_test(schedule, logsnr, distribution):
    u = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (
        stats.kstest(schedule.logsnr(schedule.training_times(u)).numpy(), distribution.cdf).pvalue
        > 0.01
    )


def test_laplace_has_the_median_and_the_mass_of_the_paper():
    """The laplace of diffusers has median 0.88 and mass 0.186 in |λ| < 0.5; ComfyUI doubles b."""
    schedule = Laplace()
    assert schedule.logsnr(0.5) == 0
    assert schedule.cdf(0.5) - schedule.cdf(-0.5) == pytest.approx(1 - math.exp(-1), abs=1e-15)
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    logsnr = schedule.logsnr(u)
    assert (logsnr.abs() < 0.5).double().mean().item() == pytest.approx(
        0.632, abs=0.006
    )  # 4 standard errors
    assert logsnr.median().item() == pytest.approx(0, abs=0.0064)  # 4 standard errors: 4 b / √n


@pytest.mark.parametrize("schedule", [Cauchy(), Cosine(), Flow(), Laplace(), Normal()], ids=repr)
def test_both_tails_keep_their_digits(schedule):
    tail = 2.0 ** -torch.arange(2, 50, dtype=torch.float64)  # 1 - tail is exact
    torch.testing.assert_close(
        schedule.logsnr(1 - tail), -schedule.logsnr(tail), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(
    ("schedule", "tail"),
    [
        (Cosine(), 2 * math.log(2 / math.pi * 1e300)),
        (Flow(), 2 * math.log(1e300)),
        (Laplace(), 0.5 * math.log(0.5e300)),
        (Normal(), 2 * stats.norm.isf(1e-300)),
        (Cauchy(), 1e300 / math.pi),
    ],
    ids=repr,
)
def test_the_clean_tail_is_finite_and_right_down_to_1e_300(schedule, tail):
    assert schedule.logsnr(1e-300) == pytest.approx(tail, rel=1e-12)
    assert schedule.time(tail) == pytest.approx(1e-300, rel=1e-10)


def test_cosine_has_alpha_cos_and_sigma_sin_of_a_quarter_turn():
    level = Cosine().level(torch.from_numpy(t))
    np.testing.assert_allclose(level.alpha, np.cos(np.pi * t / 2), rtol=1e-12)
    np.testing.assert_allclose(level.sigma, np.sin(np.pi * t / 2), rtol=1e-12)


def test_flow_is_linear_in_the_flow_scaling_and_has_blend_t_in_any():
    level = Flow().level(torch.from_numpy(t))
    np.testing.assert_allclose(level.alpha, 1 - t, rtol=1e-12)
    np.testing.assert_allclose(level.sigma, t, rtol=1e-12)
    np.testing.assert_allclose(Flow(scaling="vp").level(torch.from_numpy(t)).blend, t, rtol=1e-12)


def test_edm_draws_log_sigma_from_a_normal_distribution():
    assert Normal.edm() == Normal(2.4, 2.4, scaling="ve")
    level = Normal.edm(-1.2, 1.2).level(torch.from_numpy(t))
    np.testing.assert_allclose(
        level.sigma.log(), stats.norm(-1.2, 1.2).ppf(t), rtol=1e-10, atol=1e-12
    )


def test_logit_normal_draws_the_logit_of_time_from_a_normal_distribution():
    m, s = 0.3, 0.8
    assert Normal.logit_normal() == Normal(0.0, 2.0, scaling="flow")
    level = Normal.logit_normal(m, s).level(torch.from_numpy(t))
    np.testing.assert_allclose(
        (level.sigma / level.alpha).log(), stats.norm(m, s).ppf(t), rtol=1e-9, atol=1e-12
    )


def test_rho_has_the_levels_of_the_grid_of_edm():
    n, low, high = 18, 0.002, 80.0
    i = np.arange(n)
    grid = (
        high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))
    ) ** 7  # Karras et al., eq. 5
    level = Rho().level(torch.from_numpy(1 - i / (n - 1)))
    np.testing.assert_allclose(level.sigma, grid, rtol=1e-13)
    np.testing.assert_allclose(Rho().time(level.logsnr), 1 - i / (n - 1), rtol=0, atol=1e-14)
    steep = Rho(rho=1e5, scaling="vp").logsnr(torch.from_numpy(t))
    np.testing.assert_allclose(
        steep, LogLinear.ve(0.002, 80.0).logsnr(torch.from_numpy(t)), rtol=0, atol=1e-3
    )


def test_ve_has_a_geometric_sigma():
    level = LogLinear.ve(0.01, 50.0).level(torch.from_numpy(t))
    np.testing.assert_allclose(level.sigma, 0.01 * 5000**t, rtol=1e-13)
    assert (level.alpha == 1).all()


@pytest.mark.parametrize("make", [Rho, LogLinear.ve])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)]
)
def test_sigmas_out_of_order_are_refused(make, low, high):
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max < inf"):
        make(low, high)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (-math.inf, 0.0), (0.0, math.nan)])
def test_log_linear_needs_finite_ordered_ends(low, high):
    with pytest.raises(ValueError, match="expected finite λ with low < high"):
        LogLinear(low, high)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_are_not_positive_are_refused(value):
    with pytest.raises(ValueError, match=f"scale is {value}, expected a positive finite number"):
        Laplace(scale=value)
    with pytest.raises(ValueError, match=f"std is {value}, expected a positive finite number"):
        Normal(std=value)
    with pytest.raises(ValueError, match=f"scale is {value}, expected a positive finite number"):
        Cosine(scale=value)
    with pytest.raises(ValueError, match=f"scale is {value}, expected a positive finite number"):
        Cauchy(scale=value)
    with pytest.raises(ValueError, match=f"rho is {value}, expected a positive finite number"):
        Rho(rho=value)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_medians_that_are_not_finite_are_refused(value):
    for make, name in ((Cosine, "shift"), (Laplace, "mean"), (Normal, "mean"), (Cauchy, "mean")):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected a finite number"):
            make(**{name: value})


@pytest.mark.parametrize("make", concrete_classes(Distribution))
def test_an_unknown_scaling_is_refused(make):
    with pytest.raises(ValueError, match=r"scaling is 'edm', expected one of vp, ve, flow"):
        make(scaling="edm")
