"""Knots: strictly monotone, from the terminal level to clean, where the papers put them, for every number of steps."""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from diffcore.schedules import (
    Cosine,
    Discrete,
    Explicit,
    Flow,
    Karras,
    Level,
    Linspace,
    Normal,
    Shifted,
    Trailing,
    UniformLogSNR,
    ZeroTerminalSNR,
)

T = 1000
ALL = range(1, 1001)
STABLE = Discrete("scaled_linear", T, 0.00085, 0.012)


@dataclass(frozen=True)
class Kept(Discrete):
    """A table that computes each of its levels once, so that half a million knots take a second."""

    @cache  # noqa: B019
    def level(self, t: float) -> Level:
        return super().level(t)


@dataclass(frozen=True)
class Quick(Flow):
    """A continuous schedule in plain floats, for the same reason."""

    def level(self, t: float) -> Level:
        return Level(2 * math.log((1 - t) / t) if 0 < t < 1 else math.inf * (1 - 2 * t), t, 1 - t, t, self)


def check_contract(knots, schedule, steps):
    assert len(knots) == steps + 1
    assert knots[0].logsnr == schedule.logsnr(1.0)
    assert knots[-1].logsnr == math.inf
    assert all(a.logsnr < b.logsnr for a, b in pairwise(knots))


def indices(knots):
    """Table indices of the noisy knots; (i + 1)/T must be exact, so that float error cannot move an index."""
    found = [round(level.t * T) - 1 for level in knots[:-1]]
    assert [level.t for level in knots[:-1]] == [(i + 1) / T for i in found]
    return found


def rounded(a, b):
    """a / b rounded half to even, in integers."""
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))


def test_A3_trailing_on_a_table_is_in_integers_for_every_number_of_steps():
    """diffusers' arange(T, 0, -T/n) gives one knot too many, index -1, for 62 of these n."""
    schedule = Kept("scaled_linear", T, 0.00085, 0.012)
    for n in ALL:
        knots = Trailing().knots(schedule, n)
        check_contract(knots, schedule, n)
        assert indices(knots) == [rounded(T * (n - i), n) - 1 for i in range(n)]


def test_A3_linspace_on_a_table_runs_from_the_last_index_to_the_first_for_every_number_of_steps():
    schedule = Kept()
    for n in ALL:
        knots = Linspace().knots(schedule, n)
        check_contract(knots, schedule, n)
        assert indices(knots) == [rounded((T - 1) * (n - 1 - i), n - 1) if n > 1 else T - 1 for i in range(n)]


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
def test_A3_continuous_knots_run_from_noise_to_clean_for_every_number_of_steps(grid):
    for n in ALL:
        check_contract(grid.knots(Quick(), n), Quick(), n)


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
@pytest.mark.parametrize("schedule", [Cosine(), Shifted(Normal(), -2.0), STABLE, ZeroTerminalSNR(STABLE)], ids=repr)
def test_A3_first_knot_is_the_terminal_level_of_any_schedule(grid, schedule):
    for n in (1, 2, 7, 61, 103, 998):
        check_contract(grid.knots(schedule, n), schedule, n)


def test_trailing_times_are_even():
    knots = Trailing().knots(Cosine(), 8)
    assert [level.t for level in knots] == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert knots[2] == Cosine().level(6 / 8)


def test_linspace_times_are_even_down_to_the_last_before_clean():
    times = [level.t for level in Linspace(last=0.1).knots(Cosine(), 4)]
    assert times == pytest.approx([1, 0.7, 0.4, 0.1, 0], rel=1e-14)
    assert [level.t for level in Linspace(last=0.1).knots(Cosine(), 1)] == [1, 0]


def test_karras_is_the_published_formula():
    """EDM, eq. 5, with t_N = 0."""
    N, low, high, rho = 18, 0.002, 80.0, 7
    steps = np.arange(N)
    sigmas = (high ** (1 / rho) + steps / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    knots = Karras().knots(Normal(2.4, 2.4, scaling="ve"), N)
    np.testing.assert_allclose([level.sigma for level in knots], [*sigmas, 0], rtol=1e-12)
    assert (knots[0].ratio, knots[-2].ratio) == pytest.approx((80, 0.002), rel=1e-12)


def test_karras_gives_edm2s_32_levels():
    """The published guidance interval of EDM2, steps 17 to 22 of 32, is σ in (0.19, 1.61]."""
    ratios = [level.ratio for level in Karras().knots(Cosine(), 32)]
    assert (ratios[17], ratios[22], ratios[23]) == pytest.approx((1.609, 0.283, 0.189), abs=5e-4)


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Cosine(scaling="ve")], ids=repr)
def test_karras_names_sigma_over_alpha_in_every_scaling(schedule):
    knots = Karras(0.1, 10.0, 3.0).knots(schedule, 3)
    middle = ((10 ** (1 / 3) + 0.1 ** (1 / 3)) / 2) ** 3
    assert [level.sigma / level.alpha for level in knots] == pytest.approx([10, middle, 0.1, 0], rel=1e-12)


def test_uniform_logsnr_is_even_in_lambda():
    knots = UniformLogSNR(-6.0, 4.0).knots(Cosine(), 5)
    assert [level.logsnr for level in knots] == pytest.approx([-6, -3.5, -1, 1.5, 4, math.inf], rel=1e-14)
    assert knots[1] == Cosine().at(-3.5)


@pytest.mark.parametrize(
    ("grid", "first"), [(Karras(0.1, 10.0), -2 * math.log(10)), (UniformLogSNR(-6.0, 4.0), -6)], ids=str
)
def test_one_step_is_from_the_noisy_bound_to_clean(grid, first):
    assert [level.logsnr for level in grid.knots(Cosine(), 1)] == pytest.approx([first, math.inf], rel=1e-12)


@pytest.mark.parametrize("grid", [Karras(), UniformLogSNR()], ids=repr)
def test_finite_grids_are_strictly_monotone_for_many_numbers_of_steps(grid):
    for n in (1, 2, 3, 18, 100, 1000):
        levels = [level.logsnr for level in grid.knots(Cosine(), n)]
        assert len(levels) == n + 1
        assert all(a < b for a, b in pairwise(levels))


@pytest.mark.parametrize(
    "logsnrs", [(-math.inf, 0.0, math.inf), (7.07, 0.0, -5.0), (-3.0, -2.0), (math.inf, -math.inf)], ids=str
)
def test_explicit_gives_its_own_knots_in_either_direction_with_any_ends(logsnrs):
    knots = Explicit(list(logsnrs)).knots(Cosine(), len(logsnrs) - 1)
    assert knots == tuple(Cosine().at(logsnr) for logsnr in logsnrs)
    assert Explicit(list(logsnrs)) == Explicit(logsnrs)


@pytest.mark.parametrize("logsnrs", [(0.0, 0.0), (-3.0, 2.0, 1.0), (-1.0, math.nan), (math.inf, math.inf)], ids=str)
def test_explicit_knots_that_are_not_monotone_are_refused(logsnrs):
    with pytest.raises(ValueError, match=r"expected strictly monotone levels|has a knot at λ = nan"):
        Explicit(logsnrs).knots(Cosine(), len(logsnrs) - 1)


def test_explicit_needs_two_knots_and_the_matching_number_of_steps():
    with pytest.raises(ValueError, match="logsnrs has 1 knots, expected at least 2"):
        Explicit((1.0,))
    with pytest.raises(ValueError, match="steps is 5, but Explicit has 3 knots: pass 2"):
        Explicit((-1.0, 0.0, 1.0)).knots(Cosine(), 5)


@pytest.mark.parametrize("grid", [Trailing(), Linspace(), Karras(), UniformLogSNR()], ids=repr)
@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(grid, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected at least 1"):
        grid.knots(Cosine(), steps)


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
def test_more_steps_than_the_table_has_levels_are_refused(grid):
    assert len(grid.knots(Discrete(steps=20), 20)) == 21
    with pytest.raises(ValueError, match="cannot take 21 steps: the schedule is a table of 20 levels"):
        grid.knots(Discrete(steps=20), 21)


def test_levels_noisier_than_the_schedule_has_are_refused_with_its_bound():
    with pytest.raises(ValueError, match=r"knot at λ = -8.76.*ends at λ = -5.36.*σ/α = 14.6.*choose bounds within it"):
        Karras().knots(STABLE, 10)
    with pytest.raises(ValueError, match=r"UniformLogSNR.*knot at λ = -10,.*choose bounds within it"):
        UniformLogSNR().knots(STABLE, 10)
    with pytest.raises(ValueError, match=r"knot at λ = -inf"):
        Explicit((-math.inf, 0.0)).knots(STABLE, 1)
    assert Karras(sigma_max=14.6).knots(STABLE, 10)[0].ratio == pytest.approx(14.6)


@pytest.mark.parametrize(
    ("grid", "change", "message"),
    [
        (Karras(), {"sigma_min": 0.0}, "sigma_min and sigma_max are 0.0 and 80.0, expected 0 < min < max < inf"),
        (Karras(), {"sigma_max": math.inf}, "sigma_min and sigma_max are 0.002 and inf"),
        (Karras(), {"sigma_min": 90.0}, "sigma_min and sigma_max are 90.0 and 80.0"),
        (Karras(), {"rho": 0.0}, "rho is 0.0, expected a positive finite number"),
        (Karras(), {"rho": math.nan}, "rho is nan"),
        (UniformLogSNR(), {"low": -math.inf}, "low and high are -inf and 10.0, expected finite λ with low < high"),
        (UniformLogSNR(), {"high": math.inf}, "low and high are -10.0 and inf"),
        (UniformLogSNR(), {"low": 10.0}, "low and high are 10.0 and 10.0"),
        (Linspace(), {"last": 0.0}, r"last is 0.0, expected a time in \(0, 1\)"),
        (Linspace(), {"last": 1.0}, r"last is 1.0"),
    ],
    ids=str,
)
def test_bounds_that_make_no_grid_are_refused_when_built(grid, change, message):
    with pytest.raises(ValueError, match=message):
        replace(grid, **change)
