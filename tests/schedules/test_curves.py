"""Schedules given as curves against the published formula of each curve."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import betaln

from diffcore.schedules import (
    Beta,
    Cosine,
    Flow,
    Interpolated,
    Mode,
    PowerCosine,
    Shifted,
    Sigmoid,
    Truncated,
)

t = np.linspace(0.005, 0.995, 199)
times = torch.from_numpy(t)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def chen_sigmoid(start: float, end: float, tau: float) -> np.ndarray:
    """γ(t) of Chen 2023, Algorithm 1."""
    low, high = logistic(start / tau), logistic(end / tau)
    return (high - logistic((t * (end - start) + start) / tau)) / (high - low)


def chen_cosine(start: float, end: float, tau: float) -> np.ndarray:
    """γ(t) of Chen 2023, Algorithm 1."""
    low, high = math.cos(start * math.pi / 2) ** (2 * tau), math.cos(end * math.pi / 2) ** (2 * tau)
    return (high - np.cos((t * (end - start) + start) * math.pi / 2) ** (2 * tau)) / (high - low)


@pytest.mark.parametrize(
    "options", [(-3, 3, 1.0), (-3, 3, 0.9), (0, 3, 0.3), (-1, 4, 0.5), (-3, 3, 0.1)]
)
def test_sigmoid_is_chens_curve(options):
    gamma = chen_sigmoid(*options)
    np.testing.assert_allclose(
        Sigmoid(*options).level(times).alpha ** 2, gamma, rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize(
    "options", [(0.2, 1.0, 1.0), (0.0, 1.0, 2.0), (0.0, 0.5, 1.0), (0.2, 0.9, 0.7), (0.0, 1.0, 0.4)]
)
def test_power_cosine_is_chens_curve(options):
    gamma = chen_cosine(*options)
    np.testing.assert_allclose(
        PowerCosine(*options).level(times).alpha ** 2, gamma, rtol=1e-9, atol=1e-15
    )


def test_the_default_power_cosine_is_cosine():
    power, cosine = PowerCosine(), Cosine()
    torch.testing.assert_close(power.logsnr(times), cosine.logsnr(times), rtol=1e-13, atol=1e-13)
    levels = torch.linspace(-30, 30, 121, dtype=torch.float64)
    torch.testing.assert_close(power.density(levels), cosine.density(levels), rtol=1e-12, atol=0)
    torch.testing.assert_close(power.time(levels), cosine.time(levels), rtol=1e-12, atol=0)


EXTREME = [
    PowerCosine(tau=1e-6),
    PowerCosine(tau=1e3),
    PowerCosine(0.2, 0.9, 1e-4),
    PowerCosine(0.2, 0.9, 1e3),
    PowerCosine(0.999),
    PowerCosine(0.0, 1e-6),
    PowerCosine(0.0, 0.5),
    Sigmoid(-1e3, 1e3, 4.0),
    Sigmoid(50.0, 60.0, 0.1),
    Sigmoid(tau=1e9),
    Mode(-1.0),
]


@pytest.mark.parametrize("schedule", EXTREME, ids=repr)
def test_extreme_parameters_define_a_schedule(schedule):
    t = torch.cat(
        (
            torch.tensor([0.0, 1e-140, 1e-12], dtype=torch.float64),
            times,
            torch.tensor([1.0], dtype=torch.float64),
        )
    )
    logsnr = schedule.logsnr(t)
    assert (logsnr[0].item(), logsnr[-1].item()) == (math.inf, -math.inf)
    assert (logsnr.diff() < 0).all()
    torch.testing.assert_close(schedule.time(logsnr), t, rtol=1e-9, atol=1e-11)
    far = torch.tensor([-math.inf, -1e4, -800, 0, 800, 1e4, math.inf], dtype=torch.float64)
    for density in (schedule.density(logsnr), schedule.density(far)):
        assert ((density >= 0) & (density < math.inf)).all()
    slope = (schedule.time(logsnr[3:-1] - 1e-5) - schedule.time(logsnr[3:-1] + 1e-5)) / 2e-5
    torch.testing.assert_close(schedule.density(logsnr[3:-1]), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("tau", [0.05, 0.02])
def test_a_steep_sigmoid_keeps_the_digits_of_both_tails(tau):
    """1 - γ of the published formula has no digits here; the hyperbolic sines keep them."""
    schedule, tail = Sigmoid(-3, 3, tau), torch.logspace(-12, -2, 21, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.logsnr(tail), -schedule.logsnr(1 - tail), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(schedule.time(schedule.logsnr(tail)), tail, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, 1.75])
def test_mode_is_the_map_of_uniform_times_of_sd3(scale):
    u = 1 - t
    blend = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(Mode(scale).level(times).blend, blend, rtol=1e-12, atol=1e-15)


def test_mode_0_is_flow_and_mode_minus_1_is_the_squared_sine():
    torch.testing.assert_close(
        Mode(0.0).logsnr(times), Flow().logsnr(times), rtol=1e-13, atol=1e-13
    )
    blend = (math.pi / 2 * times).sin() ** 2
    torch.testing.assert_close(Mode(-1.0).level(times).blend, blend, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [-1.01, 1.76, math.nan])
def test_scales_for_which_mode_is_not_monotone_are_refused(scale):
    with pytest.raises(ValueError, match=rf"scale is {scale}, expected within \[-1, 1.7519\]"):
        Mode(scale)


@pytest.mark.parametrize(("p", "q"), [(1.5, 1.0), (0.5, 2.0), (3.0, 0.7)])
def test_beta_draws_the_blending_coordinate_from_a_beta_distribution(p, q):
    reference, schedule = stats.beta(p, q), Beta(p, q)
    np.testing.assert_allclose(schedule.level(times).blend, reference.ppf(t), rtol=1e-10)
    u = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert stats.kstest(schedule.level(u).blend.numpy(), reference.cdf).pvalue > 0.01
    a = schedule.level(times).blend.numpy()  # p(λ) = p(a) |da/dλ|, da/dλ = -a(1-a)/2
    np.testing.assert_allclose(
        schedule.density(schedule.logsnr(times)), reference.pdf(a) * a * (1 - a) / 2, rtol=1e-9
    )


def test_beta_1_1_is_flow():
    torch.testing.assert_close(
        Beta(1.0, 1.0).logsnr(times), Flow().logsnr(times), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "schedule", [Sigmoid(), PowerCosine(0.2, 1.0, 1.5), Mode(), Mode(-0.5)], ids=repr
)
def test_drawn_levels_pass_a_kolmogorov_smirnov_test(schedule):
    """The distribution function is the inverse of λ(t) by bisection, apart from `time`."""
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logsnr = schedule.logsnr(schedule.training_times(u))
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        middle = (low + high) / 2
        is_cleaner = schedule.logsnr(middle) > logsnr
        low, high = torch.where(is_cleaner, middle, low), torch.where(is_cleaner, high, middle)
    assert stats.kstest((1 - low).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("make", [Sigmoid, PowerCosine])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"start": 0.5, "end": 0.5},
            "start and end are 0.5 and 0.5, expected finite numbers with start < end",
        ),
        ({"tau": 0.0}, "tau is 0.0, expected a positive finite number"),
        ({"end": math.nan}, "start < end"),
    ],
)
def test_curves_without_length_or_temperature_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_parameters_outside_their_range_are_refused():
    with pytest.raises(
        ValueError, match=r"start and end are -0.1 and 1.0, expected numbers within \[0, 1\]"
    ):
        PowerCosine(-0.1)
    with pytest.raises(ValueError, match="expected at most 600: a larger value"):
        Sigmoid(tau=0.009)
    with pytest.raises(
        ValueError, match=r"p and q are 0\.0 and 1\.0, expected positive finite exponents"
    ):
        Beta(0.0)


def test_a_shifted_curve_is_shifted_in_lambda():
    assert Shifted(Sigmoid(), 1.0).logsnr(0.3) == Sigmoid().logsnr(0.3) + 1


@pytest.mark.parametrize("end", [1 - 2e-16, 1 - 1e-12, 1 - 1e-7])
def test_a_power_cosine_that_ends_next_to_1_is_next_to_the_one_that_ends_there(end):
    schedule = PowerCosine(0.1, end, 1.5)
    torch.testing.assert_close(schedule.time(schedule.logsnr(times)), times, rtol=1e-12, atol=1e-13)
    assert (schedule.logsnr(times).diff() < 0).all()
    torch.testing.assert_close(
        schedule.logsnr(times), PowerCosine(0.1, 1.0, 1.5).logsnr(times), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(("p", "q"), [(3.0, 3.0), (0.6, 4.2), (4.9, 0.5), (0.01, 1.0), (80.0, 2.0)])
def test_beta_has_its_asymptote_at_times_far_below_rounding(p, q):
    """t = a^p / pB(p, q) for a near 0, also where scipy's inverse is NaN."""
    log_t = np.array([-340.0, -300.0, -200.0, -120.0])
    logsnr = Beta(p, q).logsnr(torch.from_numpy(np.exp(log_t)))
    log_a = (log_t + np.log(p) + betaln(p, q)) / p
    expected = -2 * log_a
    far = log_a < -30
    np.testing.assert_allclose(logsnr.numpy()[far], expected[far], rtol=1e-12)
    assert logsnr.isfinite().all()
    assert (logsnr.diff() < 0).all()


@pytest.mark.parametrize(("p", "q"), [(3.0, 3.0), (0.8, 4.7), (4.4, 2.1), (0.5, 0.5)])
def test_an_interpolated_beta_is_inverted_at_every_level(p, q):
    schedule = Interpolated(Beta(p, q), 1.0, -1.0)
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.logsnr(t)), t, rtol=0, atol=1e-9)


def test_the_time_of_sigmoid_is_at_most_1_and_its_truncation_ends_there():
    logsnr = torch.tensor([-40.0, -60.0, -800.0, -math.inf], dtype=torch.float64)
    for start, tau in itertools.product(np.linspace(-4, 0, 23), np.linspace(0.4, 2, 23)):
        schedule = Sigmoid(float(start), 2.0, float(tau))
        assert schedule.time(logsnr).max() <= 1
        assert math.isfinite(Truncated(schedule, -45.0, 5.0).logsnr(1.0))


def test_the_density_of_mode_keeps_its_digits_in_both_tails():
    """For s = -1, a = sin²(πt/2) and p(λ) = sech(λ/4) / 4π."""
    logsnr = torch.tensor([-200.0, -60.0, 0.0, 60.0, 200.0], dtype=torch.float64)
    expected = 1 / (4 * math.pi * (logsnr / 4).cosh())
    torch.testing.assert_close(Mode(-1.0).density(logsnr), expected, rtol=1e-11, atol=0)


def test_the_time_of_beta_keeps_its_digits_at_the_noisy_end():
    """For p = 1, 1 - t = (1-a)^q; the level λ = -200 is at 1 - a = e^-100."""
    logsnr = torch.tensor([-400.0, -200.0, -30.0, -1.0], dtype=torch.float64)
    expected = 1 - (logsnr / 2).sigmoid() ** 0.1
    torch.testing.assert_close(Beta(1.0, 0.1).time(logsnr), expected, rtol=1e-13, atol=0)
