"""The contract of a grid, its part between other bounds, and explicit knots."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import yaml
from scipy.stats import beta

from diffcore.io.parser import ComponentParser
from diffcore.io.specs import to_spec
from diffcore.schedules import (
    AlignYourSteps,
    BetaSpacing,
    Cosine,
    Explicit,
    Flow,
    Grid,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    Trailing,
    Tuned,
    UniformBlend,
    UniformLogSNR,
    Within,
)
from tests.helpers.knots import is_decreasing_in_noise
from tests.helpers.products import sampled
from tests.helpers.schedules import GRIDS, STABLE_DIFFUSION, UNIFORM_GRIDS, concrete_classes

COORDINATES = {
    BetaSpacing(): lambda level: beta.cdf(level.t, 0.6, 0.6),
    Karras(sigma_max=14.0): lambda level: (level.sigma / level.alpha) ** (1 / 7),
    Leading(): lambda level: level.t,
    Linspace(): lambda level: level.t,
    Quadratic(): lambda level: level.t**0.5,
    Trailing(): lambda level: level.t,
    UniformBlend(): lambda level: level.sigma / (level.alpha + level.sigma),
    UniformLogSNR(-5.0, 8.0): lambda level: level.logsnr,
}
"""The coordinate in which each grid is uniform, from its paper."""


def logsnrs(grid: Grid, steps: int) -> list[float]:
    """λ of the knots on the cosine schedule."""
    return [level.logsnr for level in grid.knots(Cosine(), steps)]


def test_the_shared_list_contains_every_grid_of_the_package():
    assert {type(grid) for grid in GRIDS} == set(concrete_classes(Grid))


def test_the_coordinate_of_each_uniform_grid_is_tested():
    """Align Your Steps has no coordinate in closed form."""
    assert [grid for grid in UNIFORM_GRIDS if grid not in COORDINATES] == [
        AlignYourSteps(),
        AlignYourSteps((10.0, 1.0, 0.01)),
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(grid, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected at least 1"):
        grid.knots(Cosine(), steps)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_a_grid_equals_the_one_that_is_read_from_its_yaml(grid):
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--grid", type=Grid)
    text = yaml.safe_dump({"grid": to_spec(grid)})
    assert parser.instantiate(parser.parse_object(yaml.safe_load(text))).grid == grid


def test_levels_noisier_than_the_schedule_are_refused_with_its_bound():
    with pytest.raises(
        ValueError,
        match=r"knot at λ = -8.76.*ends at λ = -5.36.*σ/α = 14.6.*choose bounds within it",
    ):
        Karras().knots(STABLE_DIFFUSION, 10)
    with pytest.raises(
        ValueError, match=r"UniformLogSNR.*knot at λ = -10,.*choose bounds within it"
    ):
        UniformLogSNR().knots(STABLE_DIFFUSION, 10)
    with pytest.raises(ValueError, match=r"knot at λ = -inf"):
        Explicit((-math.inf, 0.0)).knots(STABLE_DIFFUSION, 1)
    assert Karras(sigma_max=14.6).knots(STABLE_DIFFUSION, 10)[0].ratio == pytest.approx(14.6)


@pytest.mark.parametrize(
    ("grid", "schedule", "bounds"),
    sampled(
        UNIFORM_GRIDS,
        [Cosine(), Flow(), STABLE_DIFFUSION],
        [(-2.0, math.inf), (-math.inf, 1.5), (-1.0, 3.0), (-4.5, math.inf)],
        count=30,
    ),
)
def test_within_has_its_bounds_as_exact_knots_and_keeps_the_number_of_steps(grid, schedule, bounds):
    low, high = bounds
    for n in (1, 2, 3, 40):
        knots = Within(grid, low, high).knots(schedule, n)
        assert len(knots) == n + 1
        assert is_decreasing_in_noise(knots)
        assert knots[-1].logsnr == high
        assert knots[0].logsnr == low or low == -math.inf


@pytest.mark.parametrize("grid", COORDINATES, ids=repr)
def test_within_is_uniform_in_the_coordinate_of_the_inner_grid(grid):
    knots = Within(grid, -2.0, 3.0).knots(Cosine(), 9)
    coordinates = np.array([COORDINATES[grid](level) for level in knots])
    uniform = np.linspace(coordinates[0], coordinates[-1], 10)
    np.testing.assert_allclose(coordinates, uniform, rtol=1e-10)


def test_within_keeps_the_clean_knot_after_the_last_noisy_one():
    within = Within(Karras(0.01, 10.0), low=-2 * math.log(3.0))
    assert logsnrs(within, 8) == pytest.approx(logsnrs(Karras(0.01, 3.0), 8), rel=1e-10)


@pytest.mark.parametrize(
    "grid", [grid for grid in UNIFORM_GRIDS if not isinstance(grid, Leading)], ids=repr
)
def test_within_infinite_bounds_is_the_inner_grid(grid):
    """Leading is the exception: its first knot is one step below its first bound."""
    assert Within(grid).knots(Flow(), 12) == grid.knots(Flow(), 12)


def test_within_composes():
    inner = Within(BetaSpacing(), low=-3.0)
    assert logsnrs(Within(inner, high=2.0), 7) == logsnrs(Within(BetaSpacing(), -3.0, 2.0), 7)
    assert logsnrs(Within(inner, low=-1.0), 7) == logsnrs(Within(BetaSpacing(), -1.0), 7)


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
        (
            lambda: Within(Trailing(), -8.0).knots(STABLE_DIFFUSION, 5),
            "knot at λ = -8.*ends at λ = -5.36",
        ),
    ],
    ids=["no coordinate", "empty", "nan", "bound of the inner grid", "beyond the schedule"],
)
def test_bounds_that_contain_no_grid_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "values",
    [(-math.inf, 0.0, math.inf), (7.07, 0.0, -5.0), (-3.0, -2.0), (math.inf, -math.inf)],
    ids=str,
)
def test_explicit_has_the_given_knots_in_either_direction_with_any_ends(values):
    knots = Explicit(list(values)).knots(Cosine(), len(values) - 1)
    assert knots == tuple(Cosine().at(logsnr) for logsnr in values)
    assert Explicit(list(values)) == Explicit(values)


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (-3.0, 2.0, 1.0), (-1.0, math.nan), (math.inf, math.inf)], ids=str
)
def test_explicit_knots_that_are_not_monotone_are_refused(values):
    with pytest.raises(
        ValueError, match=r"expected strictly monotone levels|has a knot at λ = nan"
    ):
        Explicit(values).knots(Cosine(), len(values) - 1)


def test_a_tuned_grid_has_its_knots_for_one_number_of_steps_and_another_grid_otherwise():
    grid = Tuned([-4.0, 1.0, math.inf], otherwise=Trailing())
    assert grid.steps == 2
    assert grid.knots(Cosine(), 2) == Explicit((-4.0, 1.0, math.inf)).knots(Cosine(), 2)
    assert grid.knots(Cosine(), 7) == Trailing().knots(Cosine(), 7)
    with pytest.raises(ValueError, match="logsnrs has 1 knots, expected at least 2"):
        Tuned((1.0,), Trailing())


def test_knots_of_equal_arguments_are_computed_once():
    count = 0

    @dataclass(frozen=True)
    class Counted(Trailing):
        def _levels(self, schedule, steps):
            nonlocal count
            count += 1
            return super()._levels(schedule, steps)

    class Mutable(Counted):
        __hash__ = None

    first = Counted().knots(Cosine(), 12)
    assert Counted().knots(Cosine(), 12) is first
    assert count == 1
    assert Counted().knots(Cosine(scale=2.0), 12) != first
    assert Counted().knots(Cosine(), 13) != first
    for _ in range(2):
        assert Mutable().knots(Cosine(), 12) == first
    assert count == 5


def test_explicit_needs_two_knots_and_the_matching_number_of_steps():
    with pytest.raises(ValueError, match="logsnrs has 1 knots, expected at least 2"):
        Explicit((1.0,))
    with pytest.raises(ValueError, match="steps is 5, but Explicit has 3 knots: pass steps = 2"):
        Explicit((-1.0, 0.0, 1.0)).knots(Cosine(), 5)
