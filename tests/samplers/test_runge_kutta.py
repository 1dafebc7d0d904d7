"""Adaptive pairs meet their tolerance, reach each knot, and never evaluate beyond the ends."""

import math
import pickle

import numpy as np
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import AdaptiveRungeKutta
from diffcore.samplers.runge_kutta import PAIRS
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from tests.helpers.oracles import PointMass, flow, mixture, process

NOISE = Noise(torch.arange(32), (2,), dtype=torch.float64)


class RecordingOracle:
    """An oracle that records the levels of its evaluations."""

    def __init__(self, oracle):
        self.oracle, self.process, self.levels = oracle, oracle.process, []

    def __call__(self, x, level, condition=None):
        self.levels.append(level)
        return self.oracle(x, level, condition)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_error_weights_are_those_of_a_method_one_order_lower(pair):
    """Σ e_i c_i^q = 0 for q below the lower order, and is not 0 at the lower order."""
    order, rows, error = PAIRS[pair]
    c, e, b = np.array([0.0, *map(sum, rows)]), np.array(error), np.array([*rows[-1], 0.0])
    lower = order - 1
    for q in range(order):
        assert b @ c**q == pytest.approx(1 / (q + 1), abs=1e-14)
        assert (abs(e @ c**q) < 1e-14) == (q < lower)


@pytest.mark.parametrize("schedule", (Flow(), Cosine()), ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_errors_follow_the_tolerance_from_pure_noise_to_data(pair, schedule):
    oracle = mixture(process(schedule))
    knots = Trailing().knots(schedule, 1)
    exact, evaluations = flow(oracle, NOISE.start(), *knots), []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        x, count = integrate(
            oracle, AdaptiveRungeKutta(pair, tolerance, tolerance), NOISE.start(), knots, NOISE
        )
        assert (x - exact).norm(dim=1).median() < 3 * tolerance
        evaluations.append(count)
    assert evaluations == sorted(evaluations)
    assert evaluations[-1] > 2 * evaluations[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_each_knot_is_reached_and_evaluations_stay_between_the_ends(pair):
    oracle = RecordingOracle(mixture(process(Flow())))
    sampler, knots = (
        AdaptiveRungeKutta(pair),
        Explicit((-math.inf, -3.0, 0.0, 2.0, math.inf)).knots(Flow(), 4),
    )
    state, reached = sampler.start(NOISE.start(), knots, NOISE), [knots[0]]
    while not state.done:
        after = sampler.advance(state, oracle(state.x, state.level), NOISE)
        reached += [after.level] if after.step > state.step else []
        state = after
    assert reached == list(knots)
    assert min(level.blend for level in oracle.levels) == pytest.approx(sampler.atol)
    assert all(a.logsnr <= b.logsnr for a, b in zip(oracle.levels, knots, strict=False))
    exact = flow(oracle.oracle, NOISE.start(), knots[0], knots[-1])
    assert (state.x - exact).norm(dim=1).median() < 3e-3


def test_the_step_to_an_end_nearer_than_atol_is_the_first_order_step():
    oracle = RecordingOracle(mixture(process(Flow())))
    knots = Explicit((0.0, 20.0, math.inf)).knots(Flow(), 2)
    x, _ = integrate(oracle, AdaptiveRungeKutta(), NOISE.start(), knots, NOISE)
    assert oracle.levels[-1] == knots[1]
    before, _ = integrate(oracle.oracle, AdaptiveRungeKutta(), NOISE.start(), knots[:2], NOISE)
    assert torch.equal(x, oracle.oracle(before, knots[1]).x0)


@pytest.mark.parametrize("pair", PAIRS)
def test_integration_to_noise_and_back_reproduces_the_data(pair):
    oracle, schedule = mixture(process(Flow())), Flow()
    x, ends = oracle.sample(torch.arange(32)), (schedule.at(8.0), schedule.at(-math.inf))
    sampler = AdaptiveRungeKutta(pair, 1e-6, 1e-6)
    noise, _ = integrate(oracle, sampler, x, ends, NOISE)
    torch.testing.assert_close(noise, flow(oracle, x, *ends), rtol=0, atol=2e-4)
    back, _ = integrate(oracle, sampler, noise, ends[::-1], NOISE)
    assert (back - x).norm(dim=1).median() < 1e-4


def test_a_step_is_rejected_where_the_flow_is_sharp():
    """A point mass has constant velocity and needs no rejected step; a mixture has some."""
    point = PointMass(torch.tensor([0.7, -1.3], dtype=torch.float64), process(Flow()))
    knots = Trailing().knots(Flow(), 1)
    x, easy = integrate(point, AdaptiveRungeKutta(), NOISE.start(), knots, NOISE)
    torch.testing.assert_close(x, point.point.expand_as(x), rtol=0, atol=1e-12)
    oracle = RecordingOracle(mixture(process(Flow())))
    _, hard = integrate(
        oracle, AdaptiveRungeKutta("DormandPrince", 1e-5, 1e-5), NOISE.start(), knots, NOISE
    )
    assert hard > easy
    assert (hard - 1) % 6 == (easy - 1) % 6 == 0
    assert any(
        a.blend < b.blend - 1e-6 for a, b in zip(oracle.levels, oracle.levels[6:], strict=False)
    )


def test_a_sample_alone_in_its_batch_determines_its_steps():
    oracle, knots, sampler = (
        mixture(process(Flow())),
        Trailing().knots(Flow(), 1),
        AdaptiveRungeKutta(),
    )
    together, maximum = integrate(oracle, sampler, NOISE.start(), knots, NOISE)
    alone = [integrate(oracle, sampler, sample[None], knots, NOISE) for sample in NOISE.start()]
    assert any(evaluations < maximum for _, evaluations in alone)
    assert (torch.cat([x for x, _ in alone]) - together).norm(dim=1).median() < 3e-3


def test_a_tolerance_below_rounding_is_rejected():
    sampler, knots = AdaptiveRungeKutta("DormandPrince", 0.0, 1e-7), Trailing().knots(Flow(), 1)
    sampler.start(NOISE.start(), knots, NOISE)
    with pytest.raises(ValueError, match=r"below the rounding of torch\.float32"):
        sampler.start(NOISE.start().float(), knots, NOISE)


def test_a_network_output_that_is_not_finite_raises_an_error():
    point = PointMass(torch.tensor([math.nan, 0.0], dtype=torch.float64), process(Flow()))
    with pytest.raises(ValueError, match="cannot meet its tolerance"):
        integrate(point, AdaptiveRungeKutta(), NOISE.start(), Trailing().knots(Flow(), 1), NOISE)


def test_the_number_of_evaluations_is_unknown_before_the_run():
    with pytest.raises(ValueError, match="run it"):
        AdaptiveRungeKutta().evaluations(Trailing().knots(Flow(), 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pair": "Euler"}, "pair is"),
        ({"rtol": -1.0}, "rtol is"),
        ({"atol": 0.0}, "atol is"),
        ({"atol": 1.0}, "atol is"),
    ],
)
def test_options_out_of_range_are_rejected(options, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveRungeKutta(**options)


def test_a_state_stored_within_a_step_continues_bit_for_bit():
    oracle, sampler, knots = (
        mixture(process(Flow())),
        AdaptiveRungeKutta(),
        Trailing().knots(Flow(), 2),
    )
    state, stored = sampler.start(NOISE.start(), knots, NOISE), []
    while not state.done:
        stored.append(pickle.dumps(state))
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    for saved in stored[:: len(stored) // 5]:
        again = pickle.loads(saved)
        while not again.done:
            again = sampler.advance(again, oracle(again.x, again.level), NOISE)
        assert torch.equal(again.x, state.x)
