"""Knots that are tuned to exact denoisers, whose flow is known, and what is kept of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffcore.core.conditions import Conditions
from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.evaluation.flow import solver_coordinates
from diffcore.evaluation.flow.exact_flow import solve_flow
from diffcore.evaluation.flow.grid_tuning import Candidate, GridTuning, HeldOut, Tuning
from diffcore.evaluation.flow.knot_tuning import KnotProblem, Objective, mean_log, tune_solver
from diffcore.evaluation.flow.recorded_denoiser import RecordedDenoiser
from diffcore.evaluation.flow.solver_coordinates import KnotCoordinates, SolverCoordinates
from diffcore.guidance import CFG, Interval
from diffcore.samplers import DDIM, AdamsBashforth, AdamsMoulton, Heun
from diffcore.schedules import Cosine, Discrete, Explicit, Trailing, Tuned, UniformBlend

STEPS = 5


def mixture(schedule=Cosine()):
    """Two narrow Gaussians in the plane."""
    means = torch.tensor([[1.0, 0.4], [-0.8, -0.5]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.3, 0.02], [0.05, 0.2]], dtype=torch.float64))
    process = Process(schedule, shape=(2,))
    return GaussianMixture(means, covariances, torch.tensor([0.6, 0.4]), process=process)


def problem(first, count, oracle=None):
    oracle = oracle or mixture()
    seeds = range(first, first + count)
    return KnotProblem(oracle, CFG(1.0), seeds, solve_flow(oracle, seeds, None, CFG(1.0), 200).x)


@pytest.fixture(scope="module")
def fitted():
    return problem(0, 24)


@pytest.fixture(scope="module")
def held_out():
    return problem(24, 40)


def test_parameters_of_knots_give_the_knots_back():
    knots = UniformBlend(2.0, 0.8).knots(Cosine(), 7)
    coordinates = KnotCoordinates(knots[0], math.inf)
    grid = coordinates.grid(coordinates.theta(knots))
    assert grid.logsnrs == pytest.approx([knot.logsnr for knot in knots], rel=1e-9)
    random = coordinates.grid(np.random.default_rng(0).normal(0, 3, 6))
    assert all(a < b for a, b in zip(random.logsnrs, random.logsnrs[1:], strict=False))


def test_no_knot_before_the_last_is_cleaner_than_the_levels_of_training():
    knots = Trailing().knots(Discrete(), 4)
    cleanest = Discrete().cleanest.logsnr
    coordinates = KnotCoordinates(knots[0], cleanest)
    grid = coordinates.grid(np.array([1.0, 1.0, 20.0]))
    assert grid.logsnrs[-2] == cleanest
    assert len(grid.knots(Discrete(), 4)) == 5


def coordinates_of(sampler, knots, history=0):
    return SolverCoordinates(
        sampler, KnotCoordinates(knots[0], math.inf), len(knots) - 1, history, "CFG(1.0)"
    )


def test_the_derivatives_are_those_of_the_mean_logarithm(fitted, monkeypatch):
    monkeypatch.setattr(solver_coordinates, "KNOT_DIFFERENCE", 0.01)
    monkeypatch.setattr(solver_coordinates, "COEFFICIENT_DIFFERENCE", 0.01)
    knots = UniformBlend().knots(Cosine(), STEPS)
    coordinates = coordinates_of(AdamsMoulton(1), knots, history=1)
    objective = Objective(fitted, coordinates)
    theta = coordinates.theta(knots)
    gradient, curvature = objective.derivatives(theta, objective.residuals(theta))
    expected = [
        (mean_log(objective.residuals(theta + h)) - mean_log(objective.residuals(theta - h))) / 2e-3
        for h in 1e-3 * np.eye(coordinates.size)
    ]
    assert gradient == pytest.approx(expected, rel=0.1, abs=0.03)
    assert np.linalg.eigvalsh(curvature).min() > -1e-9


def test_each_parameter_has_one_place_in_the_sampler():
    knots = UniformBlend().knots(Cosine(), 4)
    coordinates = coordinates_of(DDIM(), knots, history=2)
    theta = coordinates.theta(knots)
    assert coordinates.size == 3 + 2 * (1 + 2 + 2)
    theta[3:] = np.arange(10)
    sampler, grid = coordinates.combination(theta)
    assert sampler.x0 == ((0,), (1, 2), (3, 4))
    assert sampler.eps == ((5,), (6, 7), (8, 9))
    assert (sampler.steps, sampler.inner, sampler.guidance) == (4, DDIM(), "CFG(1.0)")
    assert grid.logsnrs[1:4] == pytest.approx([knot.logsnr for knot in knots[1:4]])


def test_a_recorded_evaluation_is_not_repeated():
    calls = []

    class Counted(GaussianMixture):
        def __call__(self, x, level, condition=None):
            calls.append(x)
            return super().__call__(x, level, condition)

    inner = Counted(torch.zeros(1, 2, dtype=torch.float64), torch.eye(2).double()[None])
    recorded = RecordedDenoiser(inner)
    level, x = inner.process.schedule.at(0.5), torch.ones(3, 2)
    other = Conditions({"a": torch.ones(3)}, {"a": torch.zeros(3, dtype=torch.bool)})
    with recorded.recording():
        first = recorded(x, level)
    assert recorded(x.clone(), level) is first
    assert len(calls) == 1
    for arguments in ((x + 1e-6, level), (x, inner.process.schedule.at(0.6)), (x, level, other)):
        assert recorded(*arguments) is not first
    assert len(calls) == 4
    with recorded.recording():
        assert recorded(x, level, other) is not first
    assert recorded(x, level, other[torch.arange(3)]) is recorded(x, level, other)
    assert recorded(x, level, Conditions({"a": torch.zeros(3)}, other.absent)) is not first
    assert len(calls) == 6


def test_exact_coefficients_of_a_gaussian_are_found():
    """The end of its flow is linear in the noise: x = μ + C^(1/2) z, C diagonal."""
    mean, variances = torch.tensor([0.4, -0.2]).double(), torch.tensor([0.5, 0.05]).double()
    oracle = GaussianMixture(mean[None], torch.diag(variances)[None], process=Process(shape=(2,)))
    ends = mean + variances.sqrt() * Noise(torch.arange(24), (2,), dtype=torch.float64).start()
    gaussian = KnotProblem(oracle, CFG(1.0), range(24), ends)
    knots = UniformBlend(1.25, 0.5).knots(Cosine(), 4)
    coordinates = coordinates_of(AdamsBashforth.flow(2), knots, history=2)
    found = tune_solver(gaussian, coordinates, coordinates.theta(knots), 16)
    assert found.history[0] > math.log(1e-3)
    assert found.value < math.log(3e-6)
    assert found.history == sorted(found.history, reverse=True)


def test_tuned_knots_are_closer_on_held_out_samples(fitted, held_out):
    start = UniformBlend(1.25, 0.5)
    knots = start.knots(Cosine(), STEPS)
    coordinates = coordinates_of(AdamsMoulton(2), knots)
    found = tune_solver(fitted, coordinates, coordinates.theta(knots), 8)
    assert found.history == sorted(found.history, reverse=True)
    before = held_out.distances(AdamsMoulton(2), start, STEPS).median()
    after = held_out.distances(AdamsMoulton(2), found.grid, STEPS).median()
    assert after < before / 1.3
    assert mean_log(fitted.residuals(AdamsMoulton(2), found.grid, STEPS)) == found.value
    assert found.evaluated <= 1 + 8 * (STEPS + 10)


def test_tuned_coefficients_are_closer_than_tuned_knots(held_out):
    """The fitted samples have 4 elements for each parameter, and others are closer too."""
    grids = (UniformBlend(1.25, 0.5),)
    settings = problem(100, 32), held_out, (AdamsMoulton(2),), grids, 1, 3
    both, alone = GridTuning(*settings).tune(4), GridTuning(*settings, history=0).tune(4)
    assert both.tuned.held_out.median < alone.tuned.held_out.median / 1.5
    sampler = both.tuned.sampler
    assert (sampler.inner, sampler.guidance) == (AdamsMoulton(2), "CFG(1.0)")
    assert sum(map(len, sampler.x0)) == 6
    assert "AdamsMoulton(2) with 12 tuned coefficients" in both.tuned.name
    assert alone.tuned.sampler == AdamsMoulton(2)


def test_few_samples_determine_few_coefficients(fitted, held_out):
    def history(fitted, steps):
        knots = Trailing().knots(Cosine(), steps)
        start = coordinates_of(DDIM(), knots)
        return GridTuning(fitted, held_out)._history(start)

    assert history(fitted, 2) == 3  # 48 elements, 3 parameters
    assert history(fitted, 5) == 1  # 12, 18 and 22 parameters
    assert history(fitted, 8) == 0
    assert history(replace(fitted, guidance=Interval(CFG(2.0), 0.3, 2.0)), 2) == 0


def test_the_search_finds_the_closest_combination_and_tunes_it(fitted, held_out):
    tuning = GridTuning(
        fitted, held_out, (DDIM(), AdamsMoulton(2)), (Trailing(), UniformBlend(1.25, 0.5)), 1, 4, 0
    )
    lines = []
    found = tuning.tune(STEPS, lines.append)
    pairs = [(s, g) for s in tuning.samplers for g in tuning.grids]
    medians = [held_out.distances(s, g, STEPS).median().item() for s, g in pairs]
    assert found.untuned.held_out.median == min(medians)
    assert (found.untuned.sampler, found.untuned.grid) == pairs[medians.index(min(medians))]
    assert found.is_better
    assert found.chosen is found.tuned
    assert isinstance(found.chosen.grid, Tuned)
    assert found.chosen.grid.guidance == "CFG(1.0)"
    assert found.chosen.grid.knots(Cosine(), 9) == found.chosen.grid.otherwise.knots(Cosine(), 9)
    assert len(lines) >= 2


def test_a_sampler_of_more_evaluations_takes_fewer_steps(fitted, held_out):
    found = GridTuning(fitted, held_out, (Heun(),), (Trailing(),), 1, 1, 0).tune(STEPS)
    assert found.chosen.steps == 3
    with pytest.raises(ValueError, match="no sampler can be tuned to 1 evaluations"):
        GridTuning(fitted, held_out, (Heun(),), (Trailing(),)).tune(1)


@pytest.mark.parametrize(
    ("median", "percentile", "is_better"),
    [(0.9, 2.0, True), (1.0, 1.0, False), (1.1, 1.0, False), (0.9, 2.19, True), (0.9, 2.21, False)],
)
def test_tuned_knots_are_kept_only_if_they_are_nowhere_farther(median, percentile, is_better):
    untuned = Candidate(DDIM(), Trailing(), 5, 1.0, HeldOut(1.0, 2.0, 3.0))
    tuned = replace(untuned, grid=Explicit((0.0, 1.0)), held_out=HeldOut(median, percentile, 1.0))
    found = Tuning(5, untuned, tuned)
    assert found.is_better == is_better
    assert found.chosen is (tuned if is_better else untuned)


def test_settings_without_work_are_refused(fitted, held_out):
    with pytest.raises(ValueError, match="starts and iterations are 0 and 6"):
        GridTuning(fitted, held_out, starts=0)
    with pytest.raises(ValueError, match="history is -1, expected 0 for knots alone"):
        GridTuning(fitted, held_out, history=-1)
    with pytest.raises(ValueError, match="samplers and grids are empty"):
        GridTuning(fitted, held_out, samplers=())
