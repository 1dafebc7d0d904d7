"""Restart visits the levels of the paper, adds its noise, and preserves the marginals."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, AlphaBlending, PredictorCorrector, Restart
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Karras, Trailing
from tests.helpers.moments import affine, moments
from tests.helpers.oracles import covariance, gaussian, mixture, process

NOISE = Noise(torch.arange(4), (2,), dtype=torch.float64)
TWO = ((0.2, 0.8, 2, 2), (1.5, 4.0, 3, 1))


def visited_levels(sampler, knots, oracle=mixture()):
    """(σ/α, x) of each evaluation, and the last state."""
    state, evaluated = sampler.start(NOISE.start(), knots, NOISE), []
    while not state.done:
        evaluated.append((state.level.ratio, state.x))
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    return evaluated, state


@pytest.mark.parametrize("sampler", (Restart(DDIM(), TWO), Restart(AlphaBlending(2), TWO)), ids=str)
def test_the_number_of_evaluations_is_exact(sampler):
    knots = Karras(0.01, 20.0).knots(Cosine(), 9)
    evaluated, state = visited_levels(sampler, knots)
    inserted = 2  # both u_min are added as knots
    assert (
        len(evaluated)
        == sampler.evaluations(knots)
        == sampler.inner.order * (9 + inserted + 2 * 2 + 3 * 1)
    )
    assert state.level == knots[-1]
    assert state.step == 9 + inserted + 2 * 2 + 3 * 1


def test_the_evaluated_levels_are_the_knots_and_the_levels_of_the_interval():
    knots = Explicit(tuple(-2 * math.log(u) for u in (10.0, 3.0, 1.0, 0.5, 0.1))).knots(Cosine(), 4)
    evaluated, _ = visited_levels(Restart(DDIM(), ((0.5, 3.0, 2, 2),)), knots)
    middle = ((3 ** (1 / 7) + 0.5 ** (1 / 7)) / 2) ** 7  # Karras' spacing with ρ = 7
    expected = [10.0, 3.0, 1.0, 3.0, middle, 3.0, middle, 0.5]  # 0.5 is a knot already
    assert [ratio for ratio, _ in evaluated] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", (Cosine(), Cosine(scaling="ve"), Flow()), ids=str)
def test_the_jump_adds_the_variance_by_which_the_levels_differ(schedule):
    """Algorithm 1: y + √(u_max² - u_min²) z in y = x/α, in every scaling."""
    knots = Explicit(tuple(-2 * math.log(u) for u in (10.0, 0.5, 0.1))).knots(schedule, 2)
    oracle, sampler = (
        gaussian([1.0, -0.5], covariance(0.8, 0.2, 0.7), process(schedule)),
        Restart(DDIM(), ((0.5, 3.0, 1, 1),)),
    )
    first, again = knots[0], schedule.at(-2 * math.log(3.0))
    evaluated, _ = visited_levels(sampler, knots, oracle)
    low = DDIM().advance(
        DDIM().start(NOISE.start(), knots, NOISE), oracle(NOISE.start(), first), NOISE
    )
    z = (evaluated[1][1] / again.alpha - low.x / low.level.alpha) / math.sqrt(3.0**2 - 0.5**2)
    torch.testing.assert_close(z, NOISE.branch(4).step(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", (8, 32))
def test_the_error_of_the_marginal_is_smaller_than_that_of_the_inner_sampler(steps):
    """The added noise contracts errors; with DDIM, of order 1, they are inverse to the steps."""
    cov = covariance(0.8, 0.2, 0.7)
    oracle = gaussian([1.0, -0.5], cov)
    knots = Explicit(tuple(-6 + 10 * i / steps for i in range(steps + 1))).knots(
        oracle.process.schedule, steps
    )
    first, last = knots[0], knots[-1]
    eye = torch.eye(2, dtype=torch.float64)
    begin = (first.alpha * oracle.means[0], first.alpha**2 * cov + first.sigma**2 * eye)
    exact = last.alpha**2 * cov + last.sigma**2 * eye
    plain, again = (
        moments(oracle, sampler, knots, *begin)[1] - exact
        for sampler in (DDIM(), Restart(DDIM(), ((0.2, 0.8, steps, 3),)))
    )
    assert plain.norm() < 3.2 / steps * exact.norm()
    assert again.norm() < 0.6 * plain.norm()


def test_no_noise_is_added_after_the_last_repeat():
    """Noise is used once for each repeat."""
    oracle = gaussian([1.0, -0.5], covariance(0.8, 0.2, 0.7))
    knots = Karras(0.01, 20.0).knots(oracle.process.schedule, 9)
    assert len(affine(oracle, Restart(DDIM(), TWO), knots)[2]) == 2 + 1


def test_restart_accepts_a_corrector_as_its_inner_sampler():
    sampler = Restart(PredictorCorrector(AlphaBlending(2), 2), TWO)
    knots = Karras(0.01, 20.0).knots(mixture().process.schedule, 9)
    evaluated, _ = visited_levels(sampler, knots)
    assert len(evaluated) == sampler.evaluations(knots)
    ends = [integrate(mixture(), sampler, NOISE.start(), knots, NOISE)[0] for _ in range(2)]
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "interval",
    ((0.0, 1.0, 1, 1), (1.0, 0.5, 1, 1), (0.5, math.inf, 1, 1), (0.5, 1.0, 0, 1), (0.5, 1.0, 1, 0)),
)
def test_invalid_intervals_are_rejected(interval):
    with pytest.raises(ValueError, match="interval is"):
        Restart(intervals=(interval,))


def test_intervals_that_overlap_are_rejected_and_those_that_touch_are_not():
    with pytest.raises(ValueError, match=r"\(0.1, 0.5, 2, 1\) and \(0.2, 0.8, 2, 1\) overlap"):
        Restart(intervals=((0.2, 0.8, 2, 1), (0.1, 0.5, 2, 1)))
    touching = Restart(DDIM(), ((0.5, 0.8, 2, 1), (0.1, 0.5, 2, 1)))
    knots = Karras(0.01, 20.0).knots(Cosine(), 9)
    assert visited_levels(touching, knots)[1].done


@pytest.mark.parametrize(
    "logsnrs", ((0.0, 4.0, 8.0), (-4.0, 1.0), (8.0, -4.0)), ids=("from below", "to above", "rising")
)
def test_intervals_outside_the_run_are_rejected(logsnrs):
    knots = Explicit(logsnrs).knots(Cosine(), len(logsnrs) - 1)
    with pytest.raises(ValueError, match="not within the run"):
        Restart(intervals=((0.2, 2.0, 2, 1),)).start(NOISE.start(), knots, NOISE)


def test_an_interval_may_lie_within_one_step_from_pure_noise():
    knots = Trailing().knots(Flow(), 1)
    x, evaluations = integrate(
        mixture(process(Flow())), Restart(DDIM()), NOISE.start(), knots, NOISE
    )
    assert x.isfinite().all()
    assert evaluations == 2 + 2 * 2
