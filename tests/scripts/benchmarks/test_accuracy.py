"""The accuracy benchmark: exact flow, start and end of all runs, tables and picture."""

import math

import pytest
import torch
from benchmarks import accuracy_report as report
from benchmarks.accuracy import (
    START,
    FlowError,
    Measurement,
    Problem,
    flow,
    measure_accuracy,
    problems,
    spectra,
)
from benchmarks.sides.samplers import GRIDS, SAMPLERS, diffcore_combinations, knots_for
from benchmarks.sides.schedulers import SCHEDULERS, diffusers_combinations

from diffcore.core.oracle import EmpiricalDistribution, GaussianMixture
from diffcore.core.process import Process
from diffcore.io.specs import describe_component
from diffcore.samplers import DDIM, Heun
from diffcore.schedules import Cosine
from tests.helpers.products import thinned

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
DEVIATIONS, MEAN = (
    torch.tensor([0.6, 0.2], dtype=torch.float64),
    torch.tensor([[0.4, -0.3]], dtype=torch.float64),
)


@pytest.fixture(scope="module")
def gaussian():
    """A problem whose flow is known in closed form."""
    return Problem(
        GaussianMixture(MEAN, torch.diag(DEVIATIONS**2)[None], process=Process(shape=(2,))), 16
    )


def exact(problem, level):
    """Along the flow, x - α m is proportional to the standard deviation √(α² s² + σ²)."""
    first = Cosine().at(START)
    spread = [(it.alpha**2 * DEVIATIONS**2 + it.sigma**2).sqrt() for it in (first, level)]
    return level.alpha * MEAN + (problem.start - first.alpha * MEAN) * spread[1] / spread[0]


def test_the_reference_is_the_exact_flow(gaussian):
    torch.testing.assert_close(
        gaussian.end, exact(gaussian, Cosine().at(math.inf)), rtol=0, atol=1e-8
    )
    for logsnr in (-math.inf, START, 0.0):
        level = Cosine().at(logsnr)
        torch.testing.assert_close(gaussian.at(level), exact(gaussian, level), rtol=0, atol=1e-8)
    vp, ve = Cosine().at(1.0), Cosine(scaling="ve").at(1.0)
    torch.testing.assert_close(gaussian.at(ve), gaussian.at(vp) / vp.alpha, rtol=1e-12, atol=1e-12)
    assert gaussian.measure_error(gaussian.end + torch.tensor([3.0, 4.0])) == pytest.approx(
        (5.0, None)
    )


def test_flips_are_ends_nearest_to_another_point():
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    problem = Problem(EmpiricalDistribution(points, process=Process(shape=(2,))), 8, points)
    torch.testing.assert_close(problem.end.abs(), points[1].expand(8, 2), rtol=0, atol=1e-12)
    x = problem.end.clone()
    x[:2] *= -0.1
    assert problem.measure_error(x) == FlowError(pytest.approx(0.0, abs=1e-12), 0.25)


@pytest.mark.parametrize(
    "entry",
    thinned([(e,) for e in SCHEDULERS if e.grid != "beta"], 26),
    ids=lambda e: f"{e.method}, {e.grid}",
)
def test_every_scheduler_of_diffusers_comes_closer_with_more_evaluations(entry, gaussian):
    """A wrong level or output would prevent that; beta spacing errs at every count."""
    errors = []
    for count in (6, 24):
        x, evaluations = entry.run(gaussian, count)
        assert count - 2 < evaluations <= count
        errors.append(gaussian.measure_error(x).median)
    assert errors[1] < errors[0] / 1.25


@pytest.mark.parametrize("count", (1, 5, 8))
def test_a_sampler_has_the_most_steps_that_its_evaluations_allow(count):
    for sampler in SAMPLERS:
        for grid, schedule in GRIDS.values():
            knots = knots_for(sampler, grid, schedule, count)
            more = None if knots is None else knots_for(sampler, grid, schedule, count + 2)
            assert (
                knots is None or sampler.evaluations(knots) <= count < sampler.evaluations(more) + 1
            )
            assert knots is None or knots[0].logsnr == pytest.approx(START, abs=1e-9)
            assert knots is None or knots[-1].sigma == 0
    assert len(knots_for(Heun(), *GRIDS["Karras()"], 5)) == 4  # two, two, one


def test_both_sides_are_measured_on_all_grids(gaussian, monkeypatch):
    monkeypatch.setattr("benchmarks.sides.samplers.SAMPLERS", (DDIM(),))
    monkeypatch.setattr("benchmarks.sides.schedulers.SCHEDULERS", SCHEDULERS[:2])
    rows = list(
        measure_accuracy(
            {"ours": diffcore_combinations, "diffusers": diffusers_combinations},
            counts=(5, 10),
            gaussian=gaussian,
        )
    )
    assert [row.side for row in rows] == ["ours"] * 2 * len(GRIDS) + ["diffusers"] * 4
    same = [
        row
        for row in rows
        if row.grid in ("Trailing, linear table", "trailing") and row.count == 10
    ]
    assert same[0].median == pytest.approx(same[1].median, rel=1e-3)  # DDIM is DDIM


def test_the_standard_problems_have_their_documented_sizes():
    made = problems(4)
    assert [problem.oracle.process.shape for problem in made.values()] == [(2,), (64,), (1, 8, 8)]
    assert made["digits"].points.shape == (1500, 1, 8, 8)
    assert spectra().eigenvalues[:, -1].sqrt() == pytest.approx(0.8)
    assert spectra().eigenvalues[:, 0].sqrt() == pytest.approx(0.8 / 64)


def test_the_flow_from_a_level_to_itself_is_the_identity(gaussian):
    level = Cosine().at(START)
    assert flow(gaussian.oracle, gaussian.start, level, level) is gaussian.start


# The report ---------------------------------------------------------------------------------------

MEASUREMENTS = [
    Measurement("ours", "A", "g", "plain", 5, 5, 0.2, None),
    Measurement("ours", "A", "h", "plain", 5, 5, 0.1, None),
    Measurement("ours", "B", "h", "plain", 5, 4, math.nan, None),
    Measurement("diffusers", "C", "g", "plain", 5, 5, 0.3, None),
    Measurement("ours", "A", "g", "points", 5, 5, 0.5, 0.0),
    Measurement("ours", "A", "h", "points", 5, 5, 0.2, 0.25),
    Measurement("diffusers", "C", "g", "points", 5, 5, 0.1, 0.5),
]


def test_the_summary_holds_the_closest_of_each_side_and_the_default():
    lines = report.format_summary(MEASUREMENTS, "A, h", 4).splitlines()
    assert lines[2] == "| plain | 5 | A, h | 0.1 | C, g | 0.3 | 0.1 | 1.00 |"
    assert (
        lines[3] == "| points | 5 | A, g | 0.0% (0.5) | C, g | 50.0% (0.1) | 25.0% (0.2) | 2.00 |"
    )  # (1/4 + 1/4) / (1/4)


def test_further_sides_stand_beside_the_default_where_they_were_measured():
    peers = [
        Measurement("azula", "D", "g", "plain", 5, 5, 0.4, None),
        Measurement("azula", "E", "h", "plain", 5, 5, 0.15, None),
    ]
    table = report.format_peers([*MEASUREMENTS, *peers], "A, g", ["azula"])
    assert table.splitlines()[2:] == [
        "| plain | 5 | 0.2 | 0.1 | E, h | 0.15 |",
        "| points | 5 | 0.0% (0.5) | 0.0% (0.5) |  |  |",
    ]


def test_the_stored_error_of_the_default_has_a_resolution_of_one_start():
    found = report.default_errors(MEASUREMENTS, "A, h", 4)
    assert found == [("plain", 5, 0.1), ("points", 5, 0.5)]  # 1/4 + 1/4


def test_the_ranking_is_over_all_cells():
    ranked = report.rank_combinations(MEASUREMENTS, 4)
    assert [name for _, _, name in ranked] == ["A, g", "A, h"]  # B is not finite; both means are √2
    assert ranked[0][:2] == pytest.approx((2**0.5, 2.0))


def test_each_method_is_shown_with_its_best_grid():
    lines = report.format_methods(MEASUREMENTS, "plain").splitlines()
    assert lines[2:] == [
        "| ours | A | h | 0.1 |",
        "| ours | B | h | nan |",
        "| diffusers | C | g | 0.3 |",
    ]


def test_the_default_is_measured():
    assert report.default_name() in {
        f"{describe_component(sampler)}, {grid}" for sampler in SAMPLERS for grid in GRIDS
    }


def test_the_picture_is_drawn(tmp_path):
    ddim = [
        Measurement("ours", "DDIM()", "Trailing, Cosine", name, 5, 5, 1.0, flips)
        for name, flips in (("plain", None), ("points", 1.0))
    ]
    report.draw([*MEASUREMENTS, *ddim], "A, h", tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
