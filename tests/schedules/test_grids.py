"""Knots: strictly monotone, from the terminal level to clean, where the papers put them, for every
number of steps.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import yaml
from diffusers import DDIMScheduler
from diffusers.schedulers import AysSchedules
from scipy.stats import beta

from diffcore.io.parser import ComponentParser
from diffcore.io.specs import to_spec
from diffcore.schedules import (
    AlignYourSteps,
    BetaSpacing,
    Cosine,
    Discrete,
    Explicit,
    Flow,
    Grid,
    Karras,
    Leading,
    Level,
    Linspace,
    Normal,
    Quadratic,
    Shifted,
    Trailing,
    UniformBlend,
    UniformLogSNR,
    Within,
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
        return Level(
            2 * math.log((1 - t) / t) if 0 < t < 1 else math.inf * (1 - 2 * t), t, 1 - t, t, self
        )

    at_blend = level


def check_contract(knots, schedule, steps):
    assert len(knots) == steps + 1
    assert knots[0].logsnr == schedule.logsnr(1.0)
    assert knots[-1].logsnr == math.inf
    assert all(a.logsnr < b.logsnr for a, b in pairwise(knots))


def indices(knots):
    """Table indices of the noisy knots; (i + 1)/T must be exact, so that float error cannot move an
    index.
    """
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
        assert indices(knots) == [
            rounded((T - 1) * (n - 1 - i), n - 1) if n > 1 else T - 1 for i in range(n)
        ]


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
def test_A3_continuous_knots_run_from_noise_to_clean_for_every_number_of_steps(grid):
    for n in ALL:
        check_contract(grid.knots(Quick(), n), Quick(), n)


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
@pytest.mark.parametrize(
    "schedule", [Cosine(), Shifted(Normal(), -2.0), STABLE, ZeroTerminalSNR(STABLE)], ids=repr
)
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
    assert [level.sigma / level.alpha for level in knots] == pytest.approx(
        [10, middle, 0.1, 0], rel=1e-12
    )


def test_uniform_logsnr_is_even_in_lambda():
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
def test_finite_grids_are_strictly_monotone_for_many_numbers_of_steps(grid):
    for n in (1, 2, 3, 18, 100, 1000):
        levels = [level.logsnr for level in grid.knots(Cosine(), n)]
        assert len(levels) == n + 1
        assert all(a < b for a, b in pairwise(levels))


@pytest.mark.parametrize(
    "logsnrs",
    [(-math.inf, 0.0, math.inf), (7.07, 0.0, -5.0), (-3.0, -2.0), (math.inf, -math.inf)],
    ids=str,
)
def test_explicit_gives_its_own_knots_in_either_direction_with_any_ends(logsnrs):
    knots = Explicit(list(logsnrs)).knots(Cosine(), len(logsnrs) - 1)
    assert knots == tuple(Cosine().at(logsnr) for logsnr in logsnrs)
    assert Explicit(list(logsnrs)) == Explicit(logsnrs)


@pytest.mark.parametrize(
    "logsnrs", [(0.0, 0.0), (-3.0, 2.0, 1.0), (-1.0, math.nan), (math.inf, math.inf)], ids=str
)
def test_explicit_knots_that_are_not_monotone_are_refused(logsnrs):
    with pytest.raises(
        ValueError, match=r"expected strictly monotone levels|has a knot at λ = nan"
    ):
        Explicit(logsnrs).knots(Cosine(), len(logsnrs) - 1)


def test_explicit_needs_two_knots_and_the_matching_number_of_steps():
    with pytest.raises(ValueError, match="logsnrs has 1 knots, expected at least 2"):
        Explicit((1.0,))
    with pytest.raises(ValueError, match="steps is 5, but Explicit has 3 knots: pass steps = 2"):
        Explicit((-1.0, 0.0, 1.0)).knots(Cosine(), 5)


@pytest.mark.parametrize("grid", [Trailing(), Linspace(), Karras(), UniformLogSNR()], ids=repr)
@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(grid, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected at least 1"):
        grid.knots(Cosine(), steps)


@pytest.mark.parametrize("grid", [Trailing(), Linspace()], ids=repr)
def test_more_steps_than_the_table_has_levels_are_refused(grid):
    assert len(grid.knots(Discrete(steps=20), 20)) == 21
    with pytest.raises(
        ValueError, match="cannot take 21 steps: the schedule is a table of 20 levels"
    ):
        grid.knots(Discrete(steps=20), 21)


def test_levels_noisier_than_the_schedule_has_are_refused_with_its_bound():
    with pytest.raises(
        ValueError,
        match=r"knot at λ = -8.76.*ends at λ = -5.36.*σ/α = 14.6.*choose bounds within it",
    ):
        Karras().knots(STABLE, 10)
    with pytest.raises(
        ValueError, match=r"UniformLogSNR.*knot at λ = -10,.*choose bounds within it"
    ):
        UniformLogSNR().knots(STABLE, 10)
    with pytest.raises(ValueError, match=r"knot at λ = -inf"):
        Explicit((-math.inf, 0.0)).knots(STABLE, 1)
    assert Karras(sigma_max=14.6).knots(STABLE, 10)[0].ratio == pytest.approx(14.6)


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
        (Linspace(), {"last": 0.0}, r"last is 0.0, expected a time in \(0, 1\)"),
        (Linspace(), {"last": 1.0}, r"last is 1.0"),
    ],
    ids=str,
)
def test_bounds_that_make_no_grid_are_refused_when_built(grid, change, message):
    with pytest.raises(ValueError, match=message):
        replace(grid, **change)


# Grids that are even in a coordinate, and parts of them


ON_TABLES = {  # the indices of the papers, written out
    Leading(): lambda n: [(n - 1 - i) * (T // n) for i in range(n)],
    Quadratic(): lambda n: (
        [round((T - 1) * ((n - 1 - i) / (n - 1)) ** 2) for i in range(n)] if n > 1 else [T - 1]
    ),
    BetaSpacing(): lambda n: [round(T * t) - 1 for t in beta.ppf(1 - np.arange(n) / n, 0.6, 0.6)],
}


@pytest.mark.parametrize("grid", ON_TABLES, ids=repr)
def test_every_number_of_steps_visits_that_many_entries_of_a_table(grid):
    schedule = Kept()
    for n in ALL:
        knots = grid.knots(schedule, n)
        found, expected = indices(knots), ON_TABLES[grid](n)
        assert len(knots) == n + 1
        assert knots[-1].logsnr == math.inf
        assert all(a > b >= 0 for a, b in pairwise(found))
        if isinstance(grid, Leading):
            assert found == expected
        else:
            assert found[0] == T - 1
            if all(a > b >= 0 for a, b in pairwise(expected)):
                assert found == expected
    assert found == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("grid", [Quadratic(), BetaSpacing()], ids=repr)
def test_entries_that_rounding_repeats_move_no_further_than_they_must(grid):
    for n in (20, 100, 300):
        found, expected = indices(grid.knots(Kept(), n)), ON_TABLES[grid](n)
        distinct = len(set(expected))
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= n - distinct + 1


@pytest.mark.parametrize("grid", [UniformBlend(), Quadratic(), BetaSpacing()], ids=repr)
def test_continuous_even_grids_run_from_noise_to_clean_for_every_number_of_steps(grid):
    for n in ALL:
        check_contract(grid.knots(Quick(), n), Quick(), n)


@pytest.mark.parametrize(
    "schedule", [Cosine(), Shifted(Normal(), -2.0), STABLE, ZeroTerminalSNR(STABLE)], ids=repr
)
def test_uniform_blend_is_even_in_a_from_the_terminal_level_of_any_schedule(schedule):
    knots = UniformBlend().knots(schedule, 10)
    check_contract(knots, schedule, 10)
    top = knots[0].sigma / (knots[0].alpha + knots[0].sigma)
    found = [level.sigma / (level.alpha + level.sigma) for level in knots]
    assert found == pytest.approx([top * (10 - i) / 10 for i in range(11)], rel=1e-12)


def test_uniform_blend_is_trailing_on_the_flow_schedule():
    even, trailing = UniformBlend().knots(Flow(), 40), Trailing().knots(Flow(), 40)
    assert [level.logsnr for level in even] == pytest.approx(
        [level.logsnr for level in trailing], rel=1e-11
    )


def test_quadratic_times_are_squares():
    assert [level.t for level in Quadratic().knots(Cosine(), 4)] == pytest.approx(
        [1, 9 / 16, 1 / 4, 1 / 16, 0]
    )


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 0.5)])
def test_beta_times_are_quantiles(a, b):
    times = [level.t for level in BetaSpacing(a, b).knots(Cosine(), 12)]
    assert times == pytest.approx(beta.ppf(1 - np.arange(13) / 12, a, b), rel=1e-12)
    if a == b == 1:
        assert times == pytest.approx(
            [level.t for level in Trailing().knots(Cosine(), 12)], rel=1e-12
        )


def test_beta_on_a_table_is_of_both_its_parameters():
    expected = [round(T * t) - 1 for t in beta.ppf(1 - np.arange(12) / 12, 2.0, 0.9)]
    assert indices(BetaSpacing(2.0, 0.9).knots(Kept(), 12)) == expected


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 3, 10, 50, 333])
def test_leading_is_diffusers_leading(n, offset):
    theirs = DDIMScheduler(T, timestep_spacing="leading", steps_offset=offset)
    theirs.set_timesteps(n)
    assert indices(Leading(offset).knots(Kept(), n)) == theirs.timesteps.tolist()


def test_leading_on_a_continuous_schedule_is_the_table_s_limit():
    times = [level.t for level in Leading(last=0.1).knots(Cosine(), 3)]
    assert times == pytest.approx([0.7, 0.4, 0.1, 0])
    assert [level.t for level in Leading(last=0.1).knots(Cosine(), 1)] == pytest.approx([0.1, 0])
    for n in (1, 2, 10, 999, 1000):
        levels = Leading().knots(Quick(), n)
        assert len(levels) == n + 1
        assert levels[0].t < 1
        assert all(a.logsnr < b.logsnr for a, b in pairwise(levels))


def test_leading_beyond_the_table_is_refused():
    """diffusers#10003: steps_offset 1 at 1000 steps is index 1000 of 1000."""
    with pytest.raises(
        ValueError, match="starts 1000 steps at index 1000 of a table of 1000 levels"
    ):
        Leading(1).knots(Kept(), 1000)


PUBLISHED = {
    "sd15": "StableDiffusionSigmas",
    "sdxl": "StableDiffusionXLSigmas",
    "svd": "StableDiffusionVideoSigmas",
}


@pytest.mark.parametrize("table", PUBLISHED)
def test_align_your_steps_at_10_steps_is_the_published_table(table):
    ratios = [level.ratio for level in AlignYourSteps(table).knots(Cosine(), 10)]
    assert ratios == pytest.approx(AysSchedules[PUBLISHED[table]], rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 25, 64, 1000])
@pytest.mark.parametrize("table", ["sd15", "svd", (8.0, 1.0, 0.5, 0.01)], ids=str)
def test_align_your_steps_interpolates_log_linearly_with_the_last_entry_replaced_by_clean(table, n):
    """Positions of n+1 levels in the table, as on the project's page; 0.029 and 0.002 are its last
    entries there.
    """
    last = {"sd15": 0.029, "svd": 0.002}.get(table)
    sigmas = list(table) if last is None else [*AysSchedules[PUBLISHED[table]][:-1], last]
    places = np.linspace(0, len(sigmas) - 1, n + 1)
    expected = np.exp(np.interp(places, np.arange(len(sigmas)), np.log(sigmas)))
    knots = AlignYourSteps(table).knots(Cosine(), n)
    np.testing.assert_allclose([level.ratio for level in knots], [*expected[:-1], 0], rtol=1e-11)
    assert all(a.logsnr < b.logsnr for a, b in pairwise(knots))


def test_align_your_steps_starts_at_stable_diffusions_terminal_level_which_its_table_rounds_up():
    knots = AlignYourSteps().knots(STABLE, 10)
    assert knots[0] == STABLE.level(1.0)
    assert [level.ratio for level in knots[1:]] == pytest.approx(
        AysSchedules["StableDiffusionSigmas"][1:], rel=1e-9
    )
    with pytest.raises(ValueError, match="choose bounds within it"):
        AlignYourSteps("svd").knots(STABLE, 10)


EVEN = [
    Trailing(),
    Linspace(),
    Leading(),
    Quadratic(),
    BetaSpacing(),
    Karras(sigma_max=14.0),
    UniformLogSNR(-5.0, 8.0),
    UniformBlend(),
    AlignYourSteps(),
    AlignYourSteps((10.0, 1.0, 0.01)),
]
COORDINATES = {  # what each class is even in, written out
    Trailing: lambda level: level.t,
    Linspace: lambda level: level.t,
    Leading: lambda level: level.t,
    Quadratic: lambda level: level.t**0.5,
    BetaSpacing: lambda level: beta.cdf(level.t, 0.6, 0.6),
    Karras: lambda level: (level.sigma / level.alpha) ** (1 / 7),
    UniformLogSNR: lambda level: level.logsnr,
    UniformBlend: lambda level: level.sigma / (level.alpha + level.sigma),
}


@pytest.mark.parametrize("schedule", [Cosine(), Flow(), STABLE], ids=repr)
@pytest.mark.parametrize("grid", EVEN, ids=repr)
@pytest.mark.parametrize(
    ("low", "high"), [(-2.0, math.inf), (-math.inf, 1.5), (-1.0, 3.0), (-4.5, math.inf)]
)
def test_within_gives_its_ends_exactly_as_knots_and_so_many_steps(grid, schedule, low, high):
    for n in (1, 2, 3, 40):
        knots = Within(grid, low, high).knots(schedule, n)
        assert len(knots) == n + 1
        assert all(a.logsnr < b.logsnr for a, b in pairwise(knots))
        assert knots[-1].logsnr == high
        assert knots[0].logsnr == low or low == -math.inf


@pytest.mark.parametrize("kind", COORDINATES, ids=lambda kind: kind.__name__)
def test_within_is_even_in_the_grids_own_coordinate(kind):
    grid = next(grid for grid in EVEN if type(grid) is kind)
    found = np.array(
        [COORDINATES[kind](level) for level in Within(grid, -2.0, 3.0).knots(Cosine(), 9)]
    )
    np.testing.assert_allclose(found, np.linspace(found[0], found[-1], 10), rtol=1e-10)


def test_a_clean_knot_follows_the_last_noisy_one_within_grids_that_end_so():
    whole, part = Karras(0.01, 10.0), Karras(0.01, 3.0)
    within = Within(whole, low=-2 * math.log(3.0)).knots(Cosine(), 8)
    expected = part.knots(Cosine(), 8)
    assert [level.logsnr for level in within] == pytest.approx(
        [level.logsnr for level in expected], rel=1e-10
    )


@pytest.mark.parametrize("grid", EVEN, ids=repr)
def test_within_nothing_is_the_grid_itself(grid):
    if not isinstance(grid, Leading):  # starts one step short of what it is within
        assert Within(grid).knots(Flow(), 12) == grid.knots(Flow(), 12)


def test_within_composes():
    both = Within(Within(BetaSpacing(), low=-3.0), high=2.0)
    assert both.knots(Cosine(), 7) == Within(BetaSpacing(), -3.0, 2.0).knots(Cosine(), 7)
    assert Within(Within(BetaSpacing(), low=-3.0), low=-1.0).knots(Cosine(), 7) == Within(
        BetaSpacing(), -1.0
    ).knots(Cosine(), 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Within(Explicit((0.0, 1.0))),
            "grid is Explicit.*expected one that is uniform in a coordinate",
        ),
        (
            lambda: Within(Trailing(), 2.0, 2.0),
            "low and high are 2.0 and 2.0, expected λ with low < high",
        ),
        (lambda: Within(Trailing(), math.nan), "low and high are nan and inf"),
        (
            lambda: Within(Karras(), 14.0).knots(Cosine(), 5),
            "first knot at λ = 14 and its last noisy one at λ = 12.4",
        ),
        (lambda: Within(Trailing(), -8.0).knots(STABLE, 5), "knot at λ = -8.*ends at λ = -5.36"),
        (lambda: Leading(-1), "offset is -1, expected an index of at least 0"),
        (lambda: Leading(last=0.0), r"last is 0.0, expected a time in \(0, 1\)"),
        (lambda: BetaSpacing(0.0), "a and b are 0.0 and 0.6, expected positive finite numbers"),
        (lambda: BetaSpacing(b=math.inf), "a and b are 0.6 and inf"),
        (
            lambda: AlignYourSteps("sd3"),
            "table is 'sd3', expected sd15, sdxl, svd, or decreasing values",
        ),
        (lambda: AlignYourSteps((1.0,)), "expected at least 2 values"),
        (lambda: AlignYourSteps((1.0, 2.0)), "that decrease and stay above 0"),
        (lambda: AlignYourSteps((1.0, 0.0)), "that decrease and stay above 0"),
        (lambda: Quadratic().knots(Discrete(steps=20), 21), "cannot take 21 steps"),
    ],
)
def test_grids_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "grid",
    [*EVEN, Explicit((-3.0, 0.0, math.inf)), Within(Within(BetaSpacing(2.0, 0.5), -3.0), high=2.0)],
    ids=repr,
)
def test_every_grid_reads_back_from_yaml(grid):
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--grid", type=Grid)
    assert (
        parser.instantiate(
            parser.parse_object(yaml.safe_load(yaml.safe_dump({"grid": to_spec(grid)})))
        ).grid
        == grid
    )
