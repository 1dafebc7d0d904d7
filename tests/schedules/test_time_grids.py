"""Grids in time: the indices and times of the papers, for numbers of steps up to 1000."""

from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDIMScheduler
from scipy.stats import beta

from diffcore.schedules import (
    BetaSpacing,
    Cosine,
    Discrete,
    Flow,
    Leading,
    Linspace,
    Normal,
    Quadratic,
    Shifted,
    Trailing,
    UniformBlend,
    ZeroTerminalSNR,
)
from diffcore.schedules.time_grids import TimeGrid
from tests.helpers.knots import (
    CachedTable,
    ScalarFlow,
    check_full_range,
    is_decreasing_in_noise,
    table_indices,
)
from tests.helpers.schedules import STABLE_DIFFUSION, UNIFORM_GRIDS

T = 1000
STEPS = [*range(1, 65), *range(65, T, 9), T - 1, T]
"""Numbers of steps: all small ones, and a sample up to the length of the table."""
TIME_GRIDS = [grid for grid in UNIFORM_GRIDS if isinstance(grid, TimeGrid)]
FULL_RANGE = [grid for grid in TIME_GRIDS if not isinstance(grid, Leading)]
"""Time grids that start at the terminal level."""


def rounded(a: int, b: int) -> int:
    """a / b rounded half to even, in integers."""
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))


PUBLISHED_INDICES = {
    Leading(): lambda n: [(n - 1 - i) * (T // n) for i in range(n)],
    Quadratic(): lambda n: (
        [round((T - 1) * ((n - 1 - i) / (n - 1)) ** 2) for i in range(n)] if n > 1 else [T - 1]
    ),
    BetaSpacing(): lambda n: [round(T * t) - 1 for t in beta.ppf(1 - np.arange(n) / n, 0.6, 0.6)],
}
"""Indices into a table of T entries as the papers define them, for n steps."""


def test_trailing_on_a_table_is_rounded_in_integers_for_each_number_of_steps():
    """diffusers' arange(T, 0, -T/n) has one knot too many, index -1, for 62 n up to 1000."""
    schedule = CachedTable("scaled_linear", T, 0.00085, 0.012)
    for n in STEPS:
        knots = Trailing().knots(schedule, n)
        check_full_range(knots, schedule, n)
        assert table_indices(knots, T) == [rounded(T * (n - i), n) - 1 for i in range(n)]


def test_linspace_on_a_table_is_from_the_last_index_to_the_first_for_each_number_of_steps():
    schedule = CachedTable()
    for n in STEPS:
        knots = Linspace().knots(schedule, n)
        check_full_range(knots, schedule, n)
        assert table_indices(knots, T) == [
            rounded((T - 1) * (n - 1 - i), n - 1) if n > 1 else T - 1 for i in range(n)
        ]


@pytest.mark.parametrize("grid", PUBLISHED_INDICES, ids=repr)
def test_n_steps_have_n_entries_of_a_table_for_each_number_of_steps(grid):
    schedule = CachedTable()
    for n in STEPS:
        knots = grid.knots(schedule, n)
        indices, published = table_indices(knots, T), PUBLISHED_INDICES[grid](n)
        assert len(knots) == n + 1
        assert knots[-1].logsnr == np.inf
        assert all(a > b >= 0 for a, b in pairwise(indices))
        if isinstance(grid, Leading):
            assert indices == published
        else:
            assert indices[0] == T - 1
            if all(a > b >= 0 for a, b in pairwise(published)):
                assert indices == published
    assert indices == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("grid", [Quadratic(), BetaSpacing()], ids=repr)
def test_entries_that_rounding_repeats_move_no_further_than_they_must(grid):
    for n in (20, 100, 300):
        indices = table_indices(grid.knots(CachedTable(), n), T)
        published = PUBLISHED_INDICES[grid](n)
        distinct = len(set(published))
        distance = max(abs(a - b) for a, b in zip(indices, published, strict=True))
        assert distance <= n - distinct + 1


@pytest.mark.parametrize("grid", [*FULL_RANGE, UniformBlend()], ids=repr)
def test_continuous_knots_are_from_noise_to_clean_for_each_number_of_steps(grid):
    for n in STEPS:
        check_full_range(grid.knots(ScalarFlow(), n), ScalarFlow(), n)


@pytest.mark.parametrize("grid", FULL_RANGE, ids=repr)
@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Shifted(Normal(), -2.0), STABLE_DIFFUSION, ZeroTerminalSNR(STABLE_DIFFUSION)],
    ids=repr,
)
def test_the_first_knot_is_the_terminal_level_of_any_schedule(grid, schedule):
    for n in (1, 2, 7, 61, 103, 998):
        check_full_range(grid.knots(schedule, n), schedule, n)


@pytest.mark.parametrize("grid", TIME_GRIDS, ids=repr)
def test_more_steps_than_a_table_has_levels_are_refused(grid):
    assert len(grid.knots(Discrete(steps=20), 20)) == 21
    with pytest.raises(
        ValueError, match="cannot take 21 steps: the schedule is a table of 20 levels"
    ):
        grid.knots(Discrete(steps=20), 21)


def test_trailing_times_are_uniform():
    knots = Trailing().knots(Cosine(), 8)
    assert [level.t for level in knots] == [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert knots[2] == Cosine().level(6 / 8)


def test_linspace_times_are_uniform_down_to_the_last_noisy_one():
    times = [level.t for level in Linspace(last=0.1).knots(Cosine(), 4)]
    assert times == pytest.approx([1, 0.7, 0.4, 0.1, 0], rel=1e-14)
    assert [level.t for level in Linspace(last=0.1).knots(Cosine(), 1)] == [1, 0]


def test_quadratic_times_are_squares():
    times = [level.t for level in Quadratic().knots(Cosine(), 4)]
    assert times == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16, 0])


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 0.5)])
def test_beta_times_are_quantiles(a, b):
    times = [level.t for level in BetaSpacing(a, b).knots(Cosine(), 12)]
    assert times == pytest.approx(beta.ppf(1 - np.arange(13) / 12, a, b), rel=1e-12)


def test_beta_spacing_of_1_and_1_is_trailing():
    times, trailing = (
        [level.t for level in grid.knots(Cosine(), 12)]
        for grid in (BetaSpacing(1.0, 1.0), Trailing())
    )
    assert times == pytest.approx(trailing, rel=1e-12)


def test_beta_indices_depend_on_both_exponents():
    published = [round(T * t) - 1 for t in beta.ppf(1 - np.arange(12) / 12, 2.0, 0.9)]
    assert table_indices(BetaSpacing(2.0, 0.9).knots(CachedTable(), 12), T) == published


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 3, 10, 50, 333])
def test_leading_is_the_leading_spacing_of_diffusers(n, offset):
    scheduler = DDIMScheduler(T, timestep_spacing="leading", steps_offset=offset)
    scheduler.set_timesteps(n)
    knots = Leading(offset).knots(CachedTable(), n)
    assert table_indices(knots, T) == scheduler.timesteps.tolist()


def test_leading_on_a_continuous_schedule_is_the_limit_of_tables():
    times = [level.t for level in Leading(last=0.1).knots(Cosine(), 3)]
    assert times == pytest.approx([0.7, 0.4, 0.1, 0])
    assert [level.t for level in Leading(last=0.1).knots(Cosine(), 1)] == pytest.approx([0.1, 0])
    for n in (1, 2, 10, 999, 1000):
        knots = Leading().knots(ScalarFlow(), n)
        assert len(knots) == n + 1
        assert knots[0].t < 1
        assert is_decreasing_in_noise(knots)


def test_leading_beyond_the_table_is_refused():
    """diffusers#10003: steps_offset 1 at 1000 steps is index 1000 of 1000."""
    with pytest.raises(
        ValueError, match="starts 1000 steps at index 1000 of a table of 1000 levels"
    ):
        Leading(1).knots(CachedTable(), 1000)


@pytest.mark.parametrize("make", [Leading, Linspace])
@pytest.mark.parametrize("last", [0.0, 1.0])
def test_a_last_time_that_is_clean_or_pure_noise_is_refused(make, last):
    with pytest.raises(ValueError, match=rf"last is {last}, expected a time in \(0, 1\)"):
        make(last=last)


def test_offsets_below_0_are_refused():
    with pytest.raises(ValueError, match="offset is -1, expected an index of at least 0"):
        Leading(-1)


@pytest.mark.parametrize(
    ("exponents", "message"),
    [((0.0, 0.6), "a and b are 0.0 and 0.6"), ((0.6, np.inf), "a and b are 0.6 and inf")],
    ids=str,
)
def test_beta_exponents_that_are_not_positive_and_finite_are_refused(exponents, message):
    with pytest.raises(ValueError, match=f"{message}, expected positive finite numbers"):
        BetaSpacing(*exponents)


def test_trailing_on_flow_is_uniform_in_the_blending_coordinate():
    blend, trailing = UniformBlend().knots(Flow(), 40), Trailing().knots(Flow(), 40)
    assert [level.logsnr for level in blend] == pytest.approx(
        [level.logsnr for level in trailing], rel=1e-11
    )
