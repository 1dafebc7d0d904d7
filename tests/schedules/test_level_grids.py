"""Grids in λ or σ/α against their published formulas and tables."""

import math
from dataclasses import replace

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from diffcore.schedules import (
    AlignYourSteps,
    Cosine,
    Flow,
    Karras,
    Normal,
    Shifted,
    UniformBlend,
    UniformLogSNR,
    ZeroTerminalSNR,
)
from tests.helpers.knots import check_full_range, is_decreasing_in_noise
from tests.helpers.schedules import STABLE_DIFFUSION

DIFFUSERS_TABLES = {
    "sd15": "StableDiffusionSigmas",
    "sdxl": "StableDiffusionXLSigmas",
    "svd": "StableDiffusionVideoSigmas",
}


def test_karras_is_the_published_formula():
    """EDM, eq. 5, with t_N = 0."""
    N, low, high, rho = 18, 0.002, 80.0, 7
    steps = np.arange(N)
    sigmas = (high ** (1 / rho) + steps / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    knots = Karras().knots(Normal(2.4, 2.4, scaling="ve"), N)
    np.testing.assert_allclose([level.sigma for level in knots], [*sigmas, 0], rtol=1e-12)
    assert (knots[0].ratio, knots[-2].ratio) == pytest.approx((80, 0.002), rel=1e-12)


def test_karras_has_the_32_levels_of_edm2():
    """The published guidance interval of EDM2, steps 17 to 22 of 32, is σ in (0.19, 1.61]."""
    ratios = [level.ratio for level in Karras().knots(Cosine(), 32)]
    assert (ratios[17], ratios[22], ratios[23]) == pytest.approx((1.609, 0.283, 0.189), abs=5e-4)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Cosine(scaling="ve")], ids=repr)
def test_the_bounds_of_karras_are_sigma_over_alpha_in_any_scaling(schedule):
    knots = Karras(0.1, 10.0, 3.0).knots(schedule, 3)
    middle = ((10 ** (1 / 3) + 0.1 ** (1 / 3)) / 2) ** 3
    assert [level.sigma / level.alpha for level in knots] == pytest.approx(
        [10, middle, 0.1, 0], rel=1e-12
    )


def test_uniform_logsnr_is_uniform_in_lambda():
    knots = UniformLogSNR(-6.0, 4.0).knots(Cosine(), 5)
    assert [level.logsnr for level in knots] == pytest.approx(
        [-6, -3.5, -1, 1.5, 4, math.inf], rel=1e-14
    )
    assert knots[1] == Cosine().at(-3.5)


@pytest.mark.parametrize(
    ("grid", "first"),
    [(Karras(0.1, 10.0), -2 * math.log(10)), (UniformLogSNR(-6.0, 4.0), -6)],
    ids=str,
)
def test_one_step_is_from_the_noisy_bound_to_clean(grid, first):
    assert [level.logsnr for level in grid.knots(Cosine(), 1)] == pytest.approx(
        [first, math.inf], rel=1e-12
    )


@pytest.mark.parametrize("grid", [Karras(), UniformLogSNR()], ids=repr)
def test_grids_with_finite_bounds_are_strictly_monotone_for_many_numbers_of_steps(grid):
    for n in (1, 2, 3, 18, 100, 1000):
        knots = grid.knots(Cosine(), n)
        assert len(knots) == n + 1
        assert is_decreasing_in_noise(knots)


@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Shifted(Normal(), -2.0), STABLE_DIFFUSION, ZeroTerminalSNR(STABLE_DIFFUSION)],
    ids=repr,
)
def test_uniform_blend_is_uniform_from_the_terminal_level_of_any_schedule(schedule):
    knots = UniformBlend().knots(schedule, 10)
    check_full_range(knots, schedule, 10)
    first = knots[0].sigma / (knots[0].alpha + knots[0].sigma)
    blends = [level.sigma / (level.alpha + level.sigma) for level in knots]
    assert blends == pytest.approx([first * (10 - i) / 10 for i in range(11)], rel=1e-12)


@pytest.mark.parametrize("table", DIFFUSERS_TABLES)
def test_align_your_steps_at_10_steps_is_the_published_table(table):
    ratios = [level.ratio for level in AlignYourSteps(table).knots(Cosine(), 10)]
    assert ratios == pytest.approx(AysSchedules[DIFFUSERS_TABLES[table]], rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 25, 64, 1000])
@pytest.mark.parametrize("table", ["sd15", "svd", (8.0, 1.0, 0.5, 0.01)], ids=str)
def test_align_your_steps_interpolates_log_linearly_and_ends_clean(table, n):
    """n+1 positions in the table as on the project page, whose last entry is 0.029 or 0.002."""
    last = {"sd15": 0.029, "svd": 0.002}.get(table)
    sigmas = list(table) if last is None else [*AysSchedules[DIFFUSERS_TABLES[table]][:-1], last]
    positions = np.linspace(0, len(sigmas) - 1, n + 1)
    expected = np.exp(np.interp(positions, np.arange(len(sigmas)), np.log(sigmas)))
    knots = AlignYourSteps(table).knots(Cosine(), n)
    np.testing.assert_allclose([level.ratio for level in knots], [*expected[:-1], 0], rtol=1e-11)
    assert is_decreasing_in_noise(knots)


def test_align_your_steps_starts_at_the_terminal_level_that_its_table_rounds():
    knots = AlignYourSteps().knots(STABLE_DIFFUSION, 10)
    assert knots[0] == STABLE_DIFFUSION.level(1.0)
    assert [level.ratio for level in knots[1:]] == pytest.approx(
        AysSchedules["StableDiffusionSigmas"][1:], rel=1e-9
    )
    with pytest.raises(ValueError, match="choose bounds within it"):
        AlignYourSteps("svd").knots(STABLE_DIFFUSION, 10)


@pytest.mark.parametrize(
    ("grid", "change", "message"),
    [
        (
            Karras(),
            {"sigma_min": 0.0},
            "sigma_min and sigma_max are 0.0 and 80.0, expected 0 < sigma_min < sigma_max < inf",
        ),
        (Karras(), {"sigma_max": math.inf}, "sigma_min and sigma_max are 0.002 and inf"),
        (Karras(), {"sigma_min": 90.0}, "sigma_min and sigma_max are 90.0 and 80.0"),
        (Karras(), {"rho": 0.0}, "rho is 0.0, expected a positive finite number"),
        (Karras(), {"rho": math.nan}, "rho is nan"),
        (
            UniformLogSNR(),
            {"low": -math.inf},
            "low and high are -inf and 10.0, expected finite λ with low < high",
        ),
        (UniformLogSNR(), {"high": math.inf}, "low and high are -10.0 and inf"),
        (UniformLogSNR(), {"low": 10.0}, "low and high are 10.0 and 10.0"),
        (UniformBlend(), {"rho": 0.0}, "rho is 0.0, expected a positive finite number"),
        (UniformBlend(), {"center": math.inf}, "center is inf, expected a positive finite number"),
        (
            AlignYourSteps(),
            {"table": "sd3"},
            "table is 'sd3', expected sd15, sdxl, svd, or decreasing values of σ/α",
        ),
        (AlignYourSteps(), {"table": (1.0,)}, "expected at least 2 values"),
        (AlignYourSteps(), {"table": (1.0, 2.0)}, "that decrease and stay above 0"),
        (AlignYourSteps(), {"table": (1.0, 0.0)}, "that decrease and stay above 0"),
    ],
    ids=str,
)
def test_bounds_and_tables_that_define_no_grid_are_refused(grid, change, message):
    with pytest.raises(ValueError, match=message):
        replace(grid, **change)
