"""Euler and Heun equal Algorithms 1 and 2 of EDM, with and without churn."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import Euler, Heun
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Flow, Karras, Trailing
from tests.helpers.oracles import SCALINGS, mixture, process

NOISE = Noise(torch.arange(16), (2,), dtype=torch.float64)
KNOTS = Karras(0.01, 40.0).knots(Cosine(scaling="ve"), 9)
ORACLE = mixture(process(Cosine(scaling="ve")))
CHURN = {"churn": 3.0, "churn_min": 0.05, "churn_max": 20.0, "noise_scale": 1.003}


def algorithm_2(x, sigmas, churn, churn_min, churn_max, noise_scale, second_order):
    """Algorithm 2 of 2206.00364 with t = σ and s = 1; the last of the sigmas is 0."""

    def slope(x, t):
        return (x - ORACLE(x, ORACLE.process.schedule.at(-2 * math.log(t))).x0) / t

    n, levels = len(sigmas) - 1, []
    for i in range(n):
        t, after = sigmas[i], sigmas[i + 1]
        gamma = min(churn / n, math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0
        t_hat = t + gamma * t
        levels.append(t_hat)
        x_hat = x + math.sqrt(t_hat**2 - t**2) * noise_scale * NOISE.step(i)
        d = slope(x_hat, t_hat)
        x = x_hat + (after - t_hat) * d
        if after != 0 and second_order:
            x = x_hat + (after - t_hat) * (d + slope(x, after)) / 2
    return x, levels


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "options",
    (
        {},
        CHURN,
        {"churn": 100.0},
        {"churn": 0.5, "churn_max": 1.0},
        {"churn": 3.0, "churn_min": KNOTS[6].ratio, "churn_max": KNOTS[2].ratio},
    ),
    ids=("none", "bounded", "strongest", "below 1", "bounds at knots"),
)
@pytest.mark.parametrize("sampler", (Euler, Heun))
def test_a_run_is_algorithm_2(sampler, options, scaling):
    options = {"churn": 0.0, "churn_min": 0.0, "churn_max": math.inf, "noise_scale": 1.0} | options
    sigmas = [knot.ratio for knot in KNOTS[:-1]] + [0.0]
    expected, levels = algorithm_2(
        sigmas[0] * NOISE.start(), sigmas, **options, second_order=sampler is Heun
    )
    oracle = mixture(process(Cosine(scaling=scaling)))
    knots = Karras(0.01, 40.0).knots(oracle.process.schedule, 9)
    state, evaluated = sampler(**options).start(knots[0].sigma * NOISE.start(), knots, NOISE), {}
    while not state.done:
        evaluated.setdefault(state.step, state.level.ratio)
        state = sampler(**options).advance(state, oracle(state.x, state.level), NOISE)
    torch.testing.assert_close(state.x, expected, rtol=1e-9, atol=1e-9)
    assert list(evaluated.values()) == pytest.approx(levels, rel=1e-9)
    assert sampler(**options).evaluations(knots) == (17 if sampler is Heun else 9)


def test_churn_acts_before_the_evaluation_with_the_noise_of_the_step():
    """The noise is that of the step that begins; in `start` this is step 0."""
    state = Euler(2.0).start(KNOTS[0].sigma * NOISE.start(), KNOTS, NOISE)
    gamma = 2 / 9
    assert state.level.ratio == pytest.approx(40 * (1 + gamma))
    added = (state.x - 40 * NOISE.start()) / (40 * math.sqrt((1 + gamma) ** 2 - 1))
    torch.testing.assert_close(added, NOISE.step(0), rtol=1e-10, atol=1e-10)


def test_churn_stays_within_the_schedules_levels():
    """The last level of a table is the noisiest at which its network is trained."""
    table = Discrete()
    knots = Explicit((table.logsnr(1.0), table.logsnr(1.0) + 0.1, 3.0)).knots(table, 2)
    first = Heun(10.0).start(NOISE.start(), knots, NOISE)
    assert first.level.logsnr == table.logsnr(1.0)
    assert torch.equal(first.x, NOISE.start())
    second = Euler(10.0).advance(
        Euler(10.0).start(NOISE.start(), knots, NOISE), mixture()(first.x, first.level), NOISE
    )
    assert second.level.logsnr == pytest.approx(table.logsnr(1.0))
    assert second.level.logsnr < knots[1].logsnr


@pytest.mark.parametrize("sampler", (Euler(5.0), Heun(5.0)))
def test_pure_noise_is_not_churned(sampler):
    oracle = mixture(process(Flow()))
    knots = Trailing().knots(Flow(), 4)
    state = sampler.start(NOISE.start(), knots, NOISE)
    assert (state.level, state.x is not None) == (knots[0], True)
    assert integrate(oracle, sampler, NOISE.start(), knots, NOISE)[0].isfinite().all()


@pytest.mark.parametrize("sampler", (Euler, Heun))
def test_churn_on_knots_that_rise_in_noise_is_rejected(sampler):
    with pytest.raises(ValueError, match="churn = 0"):
        sampler(1.0).start(NOISE.start(), KNOTS[::-1][1:], NOISE)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"churn": -1.0}, "churn is"),
        ({"churn": math.inf}, "churn is"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "churn_min and churn_max"),
        ({"churn_min": -1.0}, "churn_min and churn_max"),
        ({"noise_scale": -1.0}, "noise_scale is"),
    ],
)
def test_options_out_of_range_are_rejected(options, match):
    with pytest.raises(ValueError, match=match):
        Heun(**options)
