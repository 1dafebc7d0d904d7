"""Steps with tuned multistep coefficients: the sum that they add, and what they leave exact."""

from dataclasses import replace

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    DPMSolverPP,
    Heun,
    TunedMultistep,
    UniPC,
)
from diffcore.sampling.generation import sample
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Flow, Quadratic, Trailing
from tests.helpers.oracles import mixture

ROWS = ((0.1,), (-0.2, 0.05), (0.3, 0.1, -0.4))
OTHERS = ((-0.3,), (0.2,), (0.1, 0.15))
NONE = tuple((0.0,) * len(row) for row in ROWS)
NOISE = Noise(torch.arange(6), (2,), dtype=torch.float64)


def draw(sampler, steps=4):
    return sample(
        mixture(), sampler, Trailing(), steps, seeds=range(6), batch_size=6, dtype=torch.float64
    ).x


@pytest.mark.parametrize(
    "inner", [DDIM(), AdamsBashforth.flow(3), AdamsMoulton(2), UniPC(2), DPMSolverPP(), Heun()]
)
def test_without_deviations_and_in_other_numbers_of_steps_the_steps_are_those_of_inner(inner):
    assert torch.equal(draw(TunedMultistep(inner, NONE, NONE)), draw(inner))
    assert torch.equal(draw(TunedMultistep(inner, ROWS, OTHERS), 5), draw(inner, 5))
    assert not torch.allclose(draw(TunedMultistep(inner, ROWS, OTHERS)), draw(inner))


def test_the_steps_are_the_sum_of_the_documented_differences():
    oracle = mixture()
    knots = Quadratic().knots(oracle.process.schedule, 4)
    x, predictions = NOISE.start() * knots[0].sigma, []
    for i, (t, s) in enumerate(zip(knots, knots[1:], strict=False)):
        predictions.insert(0, oracle(x, t))
        x = s.alpha * predictions[0].x0 + s.sigma * predictions[0].eps
        scale = (s.alpha + s.sigma) * (
            t.sigma / (t.alpha + t.sigma) - s.sigma / (s.alpha + s.sigma)
        )
        for j in range(1, len(predictions)):
            b, c = ROWS[i - 1][j - 1 : j], OTHERS[i - 1][j - 1 : j]
            newer, older = predictions[j - 1], predictions[j]
            x = (
                x
                + scale * sum(b) * (newer.x0 - older.x0)
                + scale * sum(c) * (newer.eps - older.eps)
            )
    start = NOISE.start() * knots[0].sigma
    found, count = integrate(oracle, TunedMultistep(DDIM(), ROWS, OTHERS), start, knots, NOISE)
    assert count == 4
    assert torch.allclose(found, x, rtol=0, atol=1e-12)


def test_a_multistep_method_is_the_sum_with_its_own_coefficients():
    """AdamsBashforth.flow(2) adds c w_1 (f_1 - f_0), f = ε - x_0, w_1 = -h²/(2 h') over a."""
    knots = Quadratic().knots(Flow(), 4)
    a = [knot.blend for knot in knots]
    ratios = [(a[i] - a[i + 1]) / (a[i - 1] - a[i]) / 2 for i in range(1, 4)]
    x0, eps = tuple((r,) for r in ratios), tuple((-r,) for r in ratios)
    oracle = replace_schedule(mixture(), Flow())
    x = NOISE.start()
    found = integrate(oracle, TunedMultistep(DDIM(), x0, eps), x, knots, NOISE)[0]
    expected = integrate(oracle, AdamsBashforth.flow(2), x, knots, NOISE)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def replace_schedule(oracle, schedule):
    oracle.process = replace(oracle.process, schedule=schedule)
    return oracle


@pytest.mark.parametrize("inner", [DDIM(), AdamsMoulton(2)])
def test_a_flow_of_constant_x0_and_eps_stays_exact(inner):
    x0, eps = torch.full((6, 2), 0.7, dtype=torch.float64), NOISE.start()
    knots, sampler = Trailing().knots(Cosine(), 4), TunedMultistep(inner, ROWS, OTHERS)
    state = sampler.start(knots[0].alpha * x0 + knots[0].sigma * eps, knots, NOISE)
    while not state.done:
        state = sampler.advance(state, Prediction(x0, eps), NOISE)
        expected = state.level.alpha * x0 + state.level.sigma * eps
        assert torch.allclose(state.x, expected, rtol=0, atol=1e-13)


def test_no_difference_crosses_a_level_at_which_the_sampler_forgets():
    oracle, knots = mixture(), Trailing().knots(Cosine(), 4)
    sampler = TunedMultistep(DDIM(), ROWS, OTHERS)
    state = sampler.start(NOISE.start(), knots, NOISE)
    for _ in range(2):
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    forgotten = sampler.forget(state)
    prediction = oracle(state.x, state.level)
    x = sampler.advance(forgotten, prediction, NOISE).x
    assert torch.equal(x, prediction.at(knots[3]))
    assert not torch.allclose(sampler.advance(state, prediction, NOISE).x, x)


def test_it_needs_consistent_predictions_even_around_a_direct_sampler():
    assert DDIM().is_direct
    assert not TunedMultistep(DDIM()).is_direct
    assert TunedMultistep(AdamsMoulton(2)).order == 3


def test_wrong_coefficients_are_refused():
    with pytest.raises(ValueError, match="x0 and eps have 1 and 0 rows"):
        TunedMultistep(DDIM(), ((0.1,),))
    with pytest.raises(ValueError, match="expected a sampler that is not tuned"):
        TunedMultistep(TunedMultistep(DDIM()))
