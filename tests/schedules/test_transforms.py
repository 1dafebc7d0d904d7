"""Transforms of schedules against the formulas of their papers."""

import math

import pytest
import torch

from diffcore.schedules import (
    Cauchy,
    Cosine,
    Discrete,
    Flow,
    Interpolated,
    Laplace,
    LogLinear,
    Mixture,
    Normal,
    Rescaled,
    Shifted,
    Trailing,
    Truncated,
)
from tests.helpers.schedules import TRANSFORMS, all_scalings

t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@pytest.mark.parametrize(
    "schedule", [schedule for schedule in TRANSFORMS if type(schedule) is not Rescaled], ids=repr
)
def test_each_transform_but_rescaled_keeps_the_scaling_of_its_inner_schedule(schedule):
    assert schedule.scaling == schedule.inner.scaling


@pytest.mark.parametrize(
    "schedule", [Cosine(), Laplace(scaling="flow"), Discrete("cosine", 50)], ids=repr
)
def test_shifted_adds_a_constant_to_lambda_and_shifts_the_density(schedule):
    shifted = Shifted(schedule, -1.7)
    torch.testing.assert_close(shifted.logsnr(t), schedule.logsnr(t) - 1.7, rtol=0, atol=1e-14)
    levels = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert torch.equal(shifted.density(levels), schedule.density(levels + 1.7))
    assert (shifted.scaling, shifted.steps) == (schedule.scaling, schedule.steps)


def test_shifts_add_up():
    twice, once = Shifted(Shifted(Cosine(), 0.5), -2.0), Shifted(Cosine(), -1.5)
    torch.testing.assert_close(twice.logsnr(t), once.logsnr(t), rtol=0, atol=1e-14)


def test_chens_input_scale_b_is_the_shift_2_ln_b():
    b = 0.4
    gamma = torch.cos(math.pi * t / 2) ** 2
    scaled = b * gamma.sqrt() / (b**2 * gamma + 1 - gamma).sqrt()  # b √γ x_0 + √(1-γ) ε, normalised
    torch.testing.assert_close(
        Shifted(Cosine(), 2 * math.log(b)).level(t).alpha, scaled, rtol=1e-12, atol=0
    )


def test_sd3s_time_shift_s_is_the_shift_minus_2_ln_s():
    s = 3.0
    shifted = Shifted(Flow(), -2 * math.log(s)).level(t)
    torch.testing.assert_close(shifted.sigma, s * t / (1 + (s - 1) * t), rtol=1e-12, atol=0)


def test_simple_diffusions_resolution_shift_keeps_the_snr_of_pooled_pixels():
    """The mean of (d/d₀)² pixels has 1/(d/d₀)² of the noise variance.

    Pooled to the size d₀, an image of size d at λ - 2 ln(d/d₀) has the noise of one at λ.
    """
    d0, d = 64, 256
    shifted = Shifted(Cosine(), 2 * math.log(d0 / d)).level(t)
    torch.testing.assert_close(
        shifted.ratio / (d / d0), Cosine().level(t).ratio, rtol=1e-12, atol=0
    )


def test_the_constructors_of_a_shift_agree():
    """4 times the resolution, an input scale of 1/4, a time shift of 4 and λ - 2 ln 4 are equal."""
    shifted = Shifted(Flow(), -2 * math.log(4))
    for same in (
        Shifted.by_resolution(Flow(), 256, reference=64),
        Shifted.by_input_scale(Flow(), 1 / 4),
        Shifted.by_time_shift(Flow(), 4.0),
    ):
        assert same.shift == pytest.approx(shifted.shift, rel=1e-15)
        torch.testing.assert_close(same.logsnr(t), shifted.logsnr(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_are_not_positive_are_refused(value):
    for make in (Shifted.by_input_scale, Shifted.by_resolution, Shifted.by_time_shift):
        with pytest.raises(ValueError, match=f"is {value}, expected a positive finite number"):
            make(Flow(), value)


@pytest.mark.parametrize(("size", "low", "high"), [(256, 32, 256), (512, 32, 64), (256, 8, 256)])
def test_by_resolution_is_simple_diffusions_interpolation(size, low, high):
    """2301.11093: t λ_low(t) + (1-t) λ_high(t), where t = 1 is noise and λ_d is shifted for d."""
    schedule = Interpolated.by_resolution(Cosine(), size, low, high)
    cosine = -2 * torch.log(torch.tan(math.pi * t / 2))
    at_low, at_high = (cosine + 2 * math.log(d / size) for d in (low, high))
    expected = t * at_low + (1 - t) * at_high
    torch.testing.assert_close(schedule.logsnr(t), expected, rtol=1e-13, atol=1e-12)


def test_by_resolution_equals_k_diffusions_interpolation_whose_time_starts_at_noise():
    """rand_cosine_interpolated: lerp(low, high, u) of λ that rises with u, from noise at u = 0."""
    size, low, high, bound = 256, 32, 256, 2 * math.log(1e12)

    def rising(u, shift):
        start, end = (math.atan(math.exp(-0.5 * (sign * bound - shift))) for sign in (-1, 1))
        return -2 * torch.log(torch.tan(start + u * (end - start))) + shift

    shifts = [2 * math.log(d / size) for d in (low, high)]
    expected = torch.lerp(*(rising(1 - t, shift) for shift in shifts), 1 - t)
    schedule = Interpolated.by_resolution(Cosine(), size, low, high)
    torch.testing.assert_close(schedule.logsnr(t), expected, rtol=0, atol=1e-7)


def test_interpolation_is_monotone_up_to_a_ratio_of_e_to_the_pi():
    Interpolated.by_resolution(Cosine(), 64, 23.14, 1.0)
    with pytest.raises(ValueError, match="not be monotone: bring clean and noise closer"):
        Interpolated.by_resolution(Cosine(), 64, 23.15, 1.0)
    with pytest.raises(
        ValueError, match=r"clean and noise are inf and 0\.0, expected finite shifts"
    ):
        Interpolated(Cosine(), math.inf, 0.0)
    with pytest.raises(ValueError, match="high is 0, expected a positive finite number"):
        Interpolated.by_resolution(Cosine(), 64, 32, 0)


def test_equal_shifts_interpolate_to_shifted():
    torch.testing.assert_close(
        Interpolated(Flow(), 1.5, 1.5).logsnr(t), Shifted(Flow(), 1.5).logsnr(t), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    "schedule", [Mixture(Laplace()), Mixture(Normal(), Cauchy(), 0.6)], ids=repr
)
def test_a_mixture_has_the_mixed_density_and_time(schedule):
    levels, f = torch.linspace(-12, 12, 97, dtype=torch.float64), schedule.share
    for name in ("density", "time"):
        parts = [getattr(part, name)(levels) for part in (schedule.inner, schedule.floor)]
        torch.testing.assert_close(
            getattr(schedule, name)(levels), (1 - f) * parts[0] + f * parts[1], rtol=1e-15, atol=0
        )


MIXTURES = [
    Mixture(Discrete()),
    Mixture(Discrete(), Discrete("cosine", 1000)),
    Mixture(LogLinear(5, 10), LogLinear(-10, -5), 0.3),  # no level between -5 and 5
    Mixture(LogLinear(-10, 0), LogLinear(0, 10), 0.5),
    Mixture(Laplace(0.0, 1e-3), share=0.01),
    Mixture(Mixture(Rescaled(Laplace(), "flow")), Cauchy(), 0.5),
    Truncated(Mixture(LogLinear(5, 10), LogLinear(-10, -5), 0.3), -8, 8),
]


@pytest.mark.parametrize("schedule", MIXTURES, ids=repr)
def test_a_mixture_is_inverted_over_gaps_peaks_and_tables(schedule):
    times = torch.cat((torch.tensor([1e-300, 1e-20, 1e-13, 1e-6], dtype=torch.float64), t))
    logsnr = schedule.logsnr(times)
    assert logsnr.isfinite().all()
    assert logsnr.diff().max() <= 0
    torch.testing.assert_close(schedule.time(logsnr), times, rtol=1e-13, atol=1e-15)


def test_a_mixture_inverts_a_batch_in_few_evaluations(monkeypatch):
    schedule, calls = Mixture(Laplace()), []
    schedule.logsnr(0.5)  # computes the knots once
    density = Laplace._density
    monkeypatch.setattr(
        Laplace, "_density", lambda self, logsnr: calls.append(1) or density(self, logsnr)
    )
    schedule.logsnr(
        torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert 1 <= len(calls) <= 10


def test_a_uniform_floor_draws_each_level_with_at_least_its_share():
    logsnr = Mixture(Laplace(), LogLinear(-8.0, 8.0), 0.2).logsnr(
        torch.linspace(0, 1, 160_001, dtype=torch.float64)[1:-1]
    )
    counts = torch.histc(logsnr, 16, -8, 8) / len(logsnr)
    assert counts.min() == pytest.approx(0.2 / 16, rel=1e-2)
    assert (Laplace().logsnr(torch.linspace(0, 1, 160_001)[1:-1]).abs() > 7).double().mean() < 1e-5


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_shares_outside_0_and_1_are_refused(share):
    with pytest.raises(ValueError, match=rf"share is {share}, expected within \(0, 1\)"):
        Mixture(Laplace(), share=share)


@all_scalings
def test_rescaled_keeps_lambda_in_another_scaling(scaling):
    for inner in (Cosine(), Discrete(), Shifted(Flow(), 1.0)):
        rescaled = Rescaled(inner, scaling)
        assert torch.equal(rescaled.logsnr(t), inner.logsnr(t))
        assert (rescaled.scaling, rescaled.steps) == (scaling, inner.steps)
    level = Rescaled(Cosine(), "flow").level(t)
    torch.testing.assert_close(level.alpha + level.sigma, torch.ones_like(t), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="scaling is 'edm', expected one of"):
        Rescaled(Cosine(), "edm")


@pytest.mark.parametrize("shift", [math.inf, -math.inf, math.nan])
def test_shifts_that_are_not_finite_are_refused(shift):
    with pytest.raises(ValueError, match=f"shift is {shift}, expected a finite number"):
        Shifted(Cosine(), shift)


TRUNCATED = [
    Truncated(Cosine(), -6.0, 4.0),
    Truncated(Normal(2.4, 2.4, scaling="ve"), -9.0, 12.0),
    Truncated(Discrete(), -8.0, 12.0),
]


@pytest.mark.parametrize("schedule", TRUNCATED, ids=repr)
def test_truncated_is_the_inner_distribution_conditioned_on_the_bounds(schedule):
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    inner = schedule.inner
    conditioned = (inner.cdf(logsnr) - inner.cdf(schedule.low)) / (
        inner.cdf(schedule.high) - inner.cdf(schedule.low)
    )
    torch.testing.assert_close(conditioned, 1 - t, rtol=0, atol=1e-13)
    torch.testing.assert_close(schedule.time(logsnr), t, rtol=0, atol=1e-13)
    assert (logsnr[0].item(), logsnr[-1].item()) == pytest.approx(
        (schedule.high, schedule.low), rel=1e-9
    )
    assert logsnr.diff().max() < 0
    grid = torch.linspace(schedule.low - 1, schedule.high + 1, 200_001, dtype=torch.float64)
    assert torch.trapezoid(schedule.density(grid), grid).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("schedule", TRUNCATED, ids=repr)
def test_truncated_ends_clean_on_a_grid_and_is_drawn_at_any_time(schedule):
    knots = Trailing().knots(schedule, 7)
    assert knots[0].logsnr == pytest.approx(schedule.low, rel=1e-9)
    assert knots[-1].logsnr == math.inf
    u = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert torch.equal(schedule.training_times(u), u)
    assert schedule.scaling == schedule.inner.scaling


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(1.0, 1.0, "low < high"), (2.0, 1.0, "low < high"), (-30, -20, "no levels")],
)
def test_bounds_without_levels_are_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        Truncated(Discrete(), low, high)


def test_bounds_whose_times_round_to_one_number_are_refused():
    with pytest.raises(
        ValueError,
        match="has almost no levels between λ = -70 and -60: widen the bounds, or shift",
    ):
        Truncated(Cosine(), -70, -60)
    narrow = Truncated(Cosine(), 60, 70)  # of the same mass, but there t keeps its digits
    torch.testing.assert_close(narrow.time(narrow.logsnr(t)), t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("clean", "noise"), [(0.0, 0.0), (2.0, 0.5), (-1.5, -2.0)])
def test_an_interpolated_schedule_has_no_density_beyond_its_ends(clean, noise):
    """λ from -3 to 3, shifted by `clean` at t = 0 and by `noise` at t = 1."""
    schedule = Interpolated(LogLinear(-3.0, 3.0), clean, noise)
    high, low = 3 + clean, -3 + noise
    logsnr = torch.tensor([high + 1e-6, high - 1e-6, low + 1e-6, low - 1e-6], dtype=torch.float64)
    density = schedule.density(logsnr)
    assert density[[0, 3]].tolist() == [0, 0]
    assert density[[1, 2]].tolist() == pytest.approx([1 / (high - low)] * 2)
