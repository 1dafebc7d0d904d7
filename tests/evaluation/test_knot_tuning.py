"""Knots that are tuned to exact denoisers, whose flow is known, and what is kept of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.evaluation.flow import knot_tuning
from diffcore.evaluation.flow.exact_flow import solve_flow
from diffcore.evaluation.flow.grid_tuning import Candidate, GridTuning, HeldOut, Tuning
from diffcore.evaluation.flow.knot_tuning import (
    KnotCoordinates,
    KnotProblem,
    Objective,
    mean_log,
    tune_knots,
)
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AdamsMoulton, Heun
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


def test_the_derivatives_are_those_of_the_mean_logarithm(fitted, monkeypatch):
    monkeypatch.setattr(knot_tuning, "DIFFERENCE", 0.01)
    knots = UniformBlend().knots(Cosine(), STEPS)
    coordinates = KnotCoordinates(knots[0], math.inf)
    objective = Objective(fitted, AdamsMoulton(1), coordinates, STEPS)
    theta = coordinates.theta(knots)
    gradient, curvature = objective.derivatives(theta, objective.residuals(theta))
    expected = [
        (mean_log(objective.residuals(theta + h)) - mean_log(objective.residuals(theta - h))) / 2e-3
        for h in 1e-3 * np.eye(STEPS - 1)
    ]
    assert gradient == pytest.approx(expected, rel=0.1, abs=0.02)
    assert np.linalg.eigvalsh(curvature).min() > 0


def test_tuned_knots_are_closer_on_held_out_samples(fitted, held_out):
    start = UniformBlend(1.25, 0.5)
    found = tune_knots(fitted, AdamsMoulton(2), start.knots(Cosine(), STEPS), 8)
    assert found.history == sorted(found.history, reverse=True)
    before = held_out.distances(AdamsMoulton(2), start, STEPS).median()
    after = held_out.distances(AdamsMoulton(2), found.grid, STEPS).median()
    assert after < before / 1.3
    assert mean_log(fitted.residuals(AdamsMoulton(2), found.grid, STEPS)) == found.value
    assert found.evaluated <= 1 + 8 * (STEPS - 1 + 10)


def test_one_step_has_no_knot_to_tune(fitted):
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        tune_knots(fitted, DDIM(), Trailing().knots(Cosine(), 1))


def test_the_search_finds_the_closest_combination_and_tunes_it(fitted, held_out):
    tuning = GridTuning(
        fitted, held_out, (DDIM(), AdamsMoulton(2)), (Trailing(), UniformBlend(1.25, 0.5)), 1, 4
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
    found = GridTuning(fitted, held_out, (Heun(),), (Trailing(),), 1, 1).tune(STEPS)
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
    with pytest.raises(ValueError, match="samplers and grids are empty"):
        GridTuning(fitted, held_out, samplers=())
