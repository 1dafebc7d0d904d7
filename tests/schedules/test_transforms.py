"""Shifted against the papers that shift, ZeroTerminalSNR against Algorithm 1 of Lin et al. in
numpy.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

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
    Schedule,
    Shifted,
    Trailing,
    Truncated,
    ZeroTerminalSNR,
)
from diffcore.schedules.distributions import Distribution

TABLES = [
    Discrete(),
    Discrete("scaled_linear", 1000, 0.00085, 0.012),
    Discrete("cosine", 50),
    Discrete(scaling="flow"),
]
every_table = pytest.mark.parametrize("table", TABLES, ids=repr)
t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def index_times(steps: int) -> torch.Tensor:
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def algorithm_1(logsnr: np.ndarray) -> np.ndarray:
    """√ᾱ rescaled to zero terminal SNR: subtract the last, stretch to keep the first."""
    root = np.sqrt(1 / (1 + np.exp(-logsnr)))
    first, last = root[0].copy(), root[-1].copy()
    return (root - last) * first / (first - last)


@dataclass(frozen=True)
class Straight(Distribution):
    """λ from 9 at t = 0 to -4 at t = 1, uniformly: a continuous schedule with finite ends."""

    def _logsnr(self, t: torch.Tensor) -> torch.Tensor:
        return 9 - 13 * t

    def _time(self, logsnr: torch.Tensor) -> torch.Tensor:
        return ((9 - logsnr) / 13).clamp(0, 1)

    def _density(self, logsnr: torch.Tensor) -> torch.Tensor:
        return torch.where((logsnr <= 9) & (logsnr >= -4), 1 / 13, 0.0)


@pytest.mark.parametrize(
    "schedule", [Cosine(), Laplace(scaling="flow"), Discrete("cosine", 50)], ids=repr
)
def test_shifted_adds_to_lambda_and_moves_the_density_with_it(schedule):
    shifted = Shifted(schedule, -1.7)
    torch.testing.assert_close(shifted.logsnr(t), schedule.logsnr(t) - 1.7, rtol=0, atol=1e-14)
    levels = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert torch.equal(shifted.density(levels), schedule.density(levels + 1.7))
    assert (shifted.scaling, shifted.steps) == (schedule.scaling, schedule.steps)


def test_shifts_add_up():
    twice, once = Shifted(Shifted(Cosine(), 0.5), -2.0), Shifted(Cosine(), -1.5)
    torch.testing.assert_close(twice.logsnr(t), once.logsnr(t), rtol=0, atol=1e-14)


def test_A4_chens_input_scale_b_is_the_shift_2_ln_b():
    b = 0.4
    gamma = torch.cos(math.pi * t / 2) ** 2
    scaled = b * gamma.sqrt() / (b**2 * gamma + 1 - gamma).sqrt()  # b √γ x_0 + √(1-γ) ε, normalised
    torch.testing.assert_close(
        Shifted(Cosine(), 2 * math.log(b)).level(t).alpha, scaled, rtol=1e-12, atol=0
    )


def test_A4_sd3s_time_shift_s_is_the_shift_minus_2_ln_s():
    s = 3.0
    shifted = Shifted(Flow(), -2 * math.log(s)).level(t)
    torch.testing.assert_close(shifted.sigma, s * t / (1 + (s - 1) * t), rtol=1e-12, atol=0)


def test_A4_simple_diffusions_resolution_shift_keeps_the_snr_of_pooled_pixels():
    """Averaging (d/d₀)² pixels divides the noise's variance by (d/d₀)²: at d, λ - 2 ln(d/d₀) looks
    like λ at d₀.
    """
    d0, d = 64, 256
    shifted = Shifted(Cosine(), 2 * math.log(d0 / d)).level(t)
    torch.testing.assert_close(
        shifted.ratio / (d / d0), Cosine().level(t).ratio, rtol=1e-12, atol=0
    )


def test_A4_one_shift_has_four_constructors():
    """A resolution 4 times as large, an input scale of 1/4, a time shift of 4, and λ - 2 ln 4 are
    one schedule.
    """
    shifted = Shifted(Flow(), -2 * math.log(4))
    for same in (
        Shifted.by_resolution(Flow(), 256, reference=64),
        Shifted.by_input_scale(Flow(), 1 / 4),
        Shifted.by_time_shift(Flow(), 4.0),
    ):
        assert same.shift == pytest.approx(shifted.shift, rel=1e-15)
        torch.testing.assert_close(same.logsnr(t), shifted.logsnr(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_of_a_shift_that_are_not_positive_are_refused(value):
    for make in (Shifted.by_input_scale, Shifted.by_resolution, Shifted.by_time_shift):
        with pytest.raises(ValueError, match=f"is {value}, expected a positive finite number"):
            make(Flow(), value)


@pytest.mark.parametrize(("size", "low", "high"), [(256, 32, 256), (512, 32, 64), (64, 64, 32)])
def test_interpolated_is_simple_diffusions_lerp_of_two_shifts(size, low, high):
    """k-diffusion's rand_cosine_interpolated: torch.lerp(logsnr_low, logsnr_high, t)."""
    ours = Interpolated.by_resolution(Cosine(), size, low, high)
    shifts = [Cosine().logsnr(t) + 2 * math.log(d / size) for d in (low, high)]
    torch.testing.assert_close(ours.logsnr(t), torch.lerp(*shifts, t), rtol=1e-13, atol=1e-13)


def test_interpolation_folds_over_from_e_to_the_pi():
    Interpolated.by_resolution(Cosine(), 64, 1.0, 23.14)
    with pytest.raises(ValueError, match="not be monotone: bring clean and noise closer"):
        Interpolated.by_resolution(Cosine(), 64, 1.0, 23.15)
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
def test_mixture_mixes_the_densities(schedule):
    levels, f = torch.linspace(-12, 12, 97, dtype=torch.float64), schedule.share
    for name in ("density", "time"):
        parts = [getattr(part, name)(levels) for part in (schedule.inner, schedule.floor)]
        torch.testing.assert_close(
            getattr(schedule, name)(levels), (1 - f) * parts[0] + f * parts[1], rtol=1e-15, atol=0
        )


MIXED = [
    Mixture(Discrete()),
    Mixture(Discrete(), Discrete("cosine", 1000)),
    Mixture(LogLinear(5, 10), LogLinear(-10, -5), 0.3),  # no level between -5 and 5
    Mixture(LogLinear(-10, 0), LogLinear(0, 10), 0.5),
    Mixture(Laplace(0.0, 1e-3), share=0.01),
    Mixture(Mixture(Rescaled(Laplace(), "flow")), Cauchy(), 0.5),
    Truncated(Mixture(LogLinear(5, 10), LogLinear(-10, -5), 0.3), -8, 8),
]


@pytest.mark.parametrize("schedule", MIXED, ids=repr)
def test_a_mixture_is_inverted_over_gaps_peaks_and_tables(schedule):
    times = torch.cat((torch.tensor([1e-300, 1e-20, 1e-13, 1e-6], dtype=torch.float64), t))
    logsnr = schedule.logsnr(times)
    assert logsnr.isfinite().all()
    assert logsnr.diff().max() <= 0
    torch.testing.assert_close(schedule.time(logsnr), times, rtol=1e-13, atol=1e-15)


def test_a_mixture_finds_a_batch_in_few_evaluations(monkeypatch):
    schedule, calls = Mixture(Laplace()), []
    schedule.logsnr(0.5)  # its knots
    density = Laplace._density
    monkeypatch.setattr(
        Laplace, "_density", lambda self, logsnr: calls.append(1) or density(self, logsnr)
    )
    schedule.logsnr(
        torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert 1 <= len(calls) <= 10


def test_A5_a_uniform_floor_trains_every_level_at_least_its_share():
    drawn = Mixture(Laplace(), LogLinear(-8.0, 8.0), 0.2).logsnr(
        torch.linspace(0, 1, 160_001, dtype=torch.float64)[1:-1]
    )
    counts = torch.histc(drawn, 16, -8, 8) / len(drawn)
    assert counts.min() == pytest.approx(0.2 / 16, rel=1e-2)
    assert (Laplace().logsnr(torch.linspace(0, 1, 160_001)[1:-1]).abs() > 7).double().mean() < 1e-5


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_shares_of_nothing_or_all_are_refused(share):
    with pytest.raises(ValueError, match=rf"share is {share}, expected within \(0, 1\)"):
        Mixture(Laplace(), share=share)


@pytest.mark.parametrize("scaling", ["vp", "flow", "ve"])
def test_rescaled_keeps_lambda_and_changes_alpha_and_sigma(scaling):
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


@every_table
def test_zero_terminal_snr_is_algorithm_1(table):
    times = index_times(table.steps)
    root = algorithm_1(table.logsnr(times).numpy())
    logsnr = ZeroTerminalSNR(table).logsnr(times).numpy()
    assert logsnr[-1] == -math.inf
    np.testing.assert_allclose(np.sqrt(1 / (1 + np.exp(-logsnr[:-1]))), root[:-1], rtol=1e-11)
    np.testing.assert_allclose(
        logsnr[:-1], np.log(root[:-1] ** 2 / (1 - root[:-1] ** 2)), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("table", "name"), [(Discrete(), "linear"), (Discrete(start=1e-3), "linear")], ids=str
)
def test_zero_terminal_snr_is_that_of_diffusers(table, name):
    betas = torch.linspace(table.start, table.end, table.steps, dtype=torch.float64)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = ZeroTerminalSNR(table).level(index_times(table.steps)).alpha ** 2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@every_table
def test_zero_terminal_snr_leaves_levels_cleaner_than_index_0_as_they_are(table):
    early = torch.linspace(0, 1 / table.steps, 11, dtype=torch.float64)
    assert torch.equal(ZeroTerminalSNR(table).logsnr(early), table.logsnr(early))


@every_table
def test_zero_terminal_snr_keeps_scaling_and_table(table):
    zero = ZeroTerminalSNR(table)
    assert (zero.scaling, zero.steps) == (table.scaling, table.steps)
    assert (zero.level(1.0).alpha, zero.level(1.0).sigma) == (0, 1)


def test_zero_terminal_snr_treats_a_continuous_schedule_in_the_same_way():
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    zero = ZeroTerminalSNR(Straight())
    root = algorithm_1((9 - 13 * times).numpy())
    np.testing.assert_allclose(zero.level(times).alpha, root, rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(zero.time(zero.logsnr(times)), times, rtol=1e-10, atol=1e-12)
    inside = zero.logsnr(times[1:-1])
    slope = (zero.time(inside - 1e-5) - zero.time(inside + 1e-5)) / 2e-5
    torch.testing.assert_close(zero.density(inside), slope, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Shifted(Laplace(), 2.0)], ids=repr)
def test_zero_terminal_snr_does_not_change_a_schedule_that_ends_in_noise(schedule):
    zero = ZeroTerminalSNR(schedule)
    torch.testing.assert_close(zero.logsnr(t), schedule.logsnr(t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        zero.density(zero.logsnr(t)), schedule.density(schedule.logsnr(t)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("shift", [-2.0, 1.0])
def test_B2_the_order_of_transforms_is_the_order_of_the_arithmetic(shift):
    times = index_times(1000)[:-1]
    table = Discrete().logsnr(index_times(1000)).numpy()

    def logsnr(root: np.ndarray) -> np.ndarray:
        return np.log(root[:-1] ** 2 / (1 - root[:-1] ** 2))

    shift_last = Shifted(ZeroTerminalSNR(Discrete()), shift)
    shift_first = ZeroTerminalSNR(Shifted(Discrete(), shift))
    np.testing.assert_allclose(
        shift_last.logsnr(times), logsnr(algorithm_1(table)) + shift, rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
        shift_first.logsnr(times), logsnr(algorithm_1(table + shift)), rtol=0, atol=1e-9
    )
    for schedule in (shift_last, shift_first):
        assert schedule.logsnr(1.0) == -math.inf


def test_B2_a_transform_of_another_table_is_another_value():
    """Nothing derived is cached beyond the value that it derives from."""
    schedules: list[Schedule] = [
        ZeroTerminalSNR(Discrete()),
        ZeroTerminalSNR(Discrete(end=0.01)),
        Discrete(end=0.01),
    ]
    assert len({schedule.logsnr(0.5) for schedule in schedules}) == 3
    assert schedules[0] != schedules[1]


TRUNCATED = [
    Truncated(Cosine(), -6.0, 4.0),
    Truncated(Normal(2.4, 2.4, scaling="ve"), -9.0, 12.0),
    Truncated(Discrete(), -8.0, 12.0),
]


@pytest.mark.parametrize("schedule", TRUNCATED, ids=repr)
def test_truncated_is_the_inner_density_given_that_the_level_lies_within(schedule):
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    inner = schedule.inner
    given = (inner.cdf(logsnr) - inner.cdf(schedule.low)) / (
        inner.cdf(schedule.high) - inner.cdf(schedule.low)
    )
    torch.testing.assert_close(given, 1 - t, rtol=0, atol=1e-13)
    torch.testing.assert_close(schedule.time(logsnr), t, rtol=0, atol=1e-13)
    assert (logsnr[0].item(), logsnr[-1].item()) == pytest.approx(
        (schedule.high, schedule.low), rel=1e-9
    )
    assert logsnr.diff().max() < 0
    grid = torch.linspace(schedule.low - 1, schedule.high + 1, 200_001, dtype=torch.float64)
    assert torch.trapezoid(schedule.density(grid), grid).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("schedule", TRUNCATED, ids=repr)
def test_truncated_levels_end_clean_on_a_grid_and_are_drawn_at_every_time(schedule):
    knots = Trailing().knots(schedule, 7)
    assert knots[0].logsnr == pytest.approx(schedule.low, rel=1e-9)
    assert knots[-1].logsnr == math.inf
    u = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert torch.equal(schedule.training_times(u), u)
    assert schedule.scaling == schedule.inner.scaling


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [(1.0, 1.0, "low < high"), (2.0, 1.0, "low < high"), (-30, -20, "no levels")],
)
def test_truncation_to_nothing_is_refused(low, high, remedy):
    with pytest.raises(ValueError, match=remedy):
        Truncated(Discrete(), low, high)


def test_truncation_to_levels_that_times_cannot_tell_apart_is_refused():
    with pytest.raises(
        ValueError,
        match="has almost no levels between λ = -70 and -60: widen the bounds, or shift",
    ):
        Truncated(Cosine(), -70, -60)
    narrow = Truncated(Cosine(), 60, 70)  # of the same mass, where t has all its digits
    torch.testing.assert_close(narrow.time(narrow.logsnr(t)), t, rtol=1e-10, atol=1e-12)
