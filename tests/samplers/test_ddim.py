"""DDIM equals the formulas of its paper and of DDPM, and diffusers' scheduler."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, target
from diffcore.samplers import DDIM, State
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Trailing
from tests.helpers.oracles import flow, mixture, process

NOISE = Noise(torch.arange(8), (2,), dtype=torch.float64)
X0, EPS = (
    torch.linspace(a, b, 16, dtype=torch.float64).sin().view(8, 2) for a, b in ((1, 7), (2, 30))
)
PAIRS = ((-math.inf, -3.0), (-9.0, -2.0), (-1.0, 0.5), (2.0, 6.0), (3.0, math.inf))


def step(sampler, scaling, t, s):
    """(α, σ) at both knots and x at the second, from x = α x_0 + σ ε at the first."""
    t, s = (Cosine(scaling=scaling).at(logsnr) for logsnr in (t, s))
    state = State(t.alpha * X0 + t.sigma * EPS, t, (s,), step=5)
    return t, s, sampler.advance(state, Prediction(X0, EPS), NOISE)


@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_a_step_is_equation_12_and_16_of_the_paper(t, s, eta):
    """2010.02502, which writes α for ᾱ: σ = η √((1-ᾱ_s)/(1-ᾱ_t)) √(1-ᾱ_t/ᾱ_s)."""
    t, s, state = step(DDIM(eta), "vp", t, s)
    bar_t, bar_s = t.alpha**2, s.alpha**2
    sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    expected = math.sqrt(bar_s) * X0 + math.sqrt(1 - bar_s - sigma**2) * EPS + sigma * NOISE.step(5)
    torch.testing.assert_close(state.x, expected, rtol=1e-11, atol=1e-11)
    assert (state.level, state.remaining, state.step, state.done) == (s, (), 6, True)


@pytest.mark.parametrize("scaling", ("ve", "flow"))
@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
@pytest.mark.parametrize(("t", "s"), PAIRS[1:])
def test_the_step_is_the_same_in_every_scaling(t, s, eta, scaling):
    _, _, vp = step(DDIM(eta), "vp", t, s)
    _, s, other = step(DDIM(eta), scaling, t, s)
    torch.testing.assert_close(other.x / math.hypot(s.alpha, s.sigma), vp.x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("t", "s"), PAIRS[1:])
def test_eta_1_samples_the_posterior_of_ddpm(t, s):
    """2006.11239, eq. 7, with α = ᾱ_t/ᾱ_s and β = 1 - α of the step between the two knots."""
    t, s, state = step(DDIM(1.0), "vp", t, s)
    bar_t, bar_s = t.alpha**2, s.alpha**2
    alpha, beta = bar_t / bar_s, 1 - bar_t / bar_s
    x = t.alpha * X0 + t.sigma * EPS
    mean = (
        math.sqrt(bar_s) * beta / (1 - bar_t) * X0
        + math.sqrt(alpha) * (1 - bar_s) / (1 - bar_t) * x
    )
    variance = (1 - bar_s) / (1 - bar_t) * beta
    torch.testing.assert_close(
        state.x, mean + math.sqrt(variance) * NOISE.step(5), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("scaling", ("vp", "flow"))
def test_from_pure_noise_eta_1_renoises_in_full(scaling):
    _, s, state = step(DDIM(1.0), scaling, -math.inf, -2.0)
    torch.testing.assert_close(
        state.x, s.alpha * X0 + s.sigma * NOISE.step(5), rtol=1e-12, atol=1e-12
    )


def test_each_step_has_independent_noise():
    """With 300 numbers per step, independent ones correlate by less than 5/√300 = 0.29."""
    many = Noise(torch.arange(300), (1,), dtype=torch.float64)
    steps = torch.stack([many.start().flatten(), *(many.step(i).flatten() for i in range(4))])
    assert (steps.corrcoef() - torch.eye(5)).abs().max() < 0.29


@pytest.mark.parametrize("eta", (0.0, 0.7))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_steps_equal_diffusers_where_its_previous_timestep_is_the_next_knot(prediction, eta):
    """For 10 trailing steps of a table of 1000, t - T//n is the next knot.

    The tolerance is 1e-5 because the table of diffusers has ᾱ in float32.
    """
    theirs = DDIMScheduler(
        1000,
        1e-4,
        0.02,
        "linear",
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(10)
    oracle = mixture(process(Discrete()))
    knots = Trailing().knots(oracle.process.schedule, 10)
    assert [round(1000 * knot.t) - 1 for knot in knots] == [*theirs.timesteps.tolist(), -1]
    state, x = DDIM(eta).start(NOISE.start(), knots, NOISE), NOISE.start()
    for t in theirs.timesteps:
        output = target(prediction, *oracle(x, state.level), state.level, 0.5)
        x = theirs.step(output, t, x, eta=eta, variance_noise=NOISE.step(state.step)).prev_sample
        state = DDIM(eta).advance(state, oracle(state.x, state.level), NOISE)
        torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)


def test_eta_0_follows_the_flow_from_data_to_noise():
    """The error is of first order: 0.0045 at 500 steps and half as much at 1000."""
    oracle = mixture()
    schedule, x = oracle.process.schedule, oracle.sample(torch.arange(8))
    exact = flow(oracle, x, schedule.at(6.0), schedule.at(-6.0))
    errors = []
    for n in (500, 1000):
        knots = Explicit(tuple(6 - 12 * i / n for i in range(n + 1))).knots(schedule, n)
        errors.append((integrate(oracle, DDIM(), x, knots, NOISE)[0] - exact).norm(dim=1).median())
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("logsnrs", ((0.0, -1.0), (math.inf, 3.0), (0.0, -math.inf)))
def test_fresh_noise_is_rejected_on_the_way_to_noise(logsnrs):
    with pytest.raises(ValueError, match="fall in noise"):
        step(DDIM(0.5), "vp", *logsnrs)


@pytest.mark.parametrize("eta", (-0.1, 1.1, math.nan))
def test_eta_outside_0_to_1_is_rejected(eta):
    with pytest.raises(ValueError, match="eta is"):
        DDIM(eta)


@pytest.mark.parametrize("scaling", ("vp", "ve", "flow"))
@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_knots_may_be_maps_of_levels(eta, scaling):
    """Each element equals that of a run at its level; a clean element does not change."""
    before, after = [-9.0, -1.0, 2.0, 2.0, math.inf], [-2.0, 0.5, 3.0, math.inf, math.inf]
    schedule = Cosine(scaling=scaling)
    t, s = (schedule.at(torch.tensor(v, dtype=torch.float64)) for v in (before, after))
    x0, eps = (
        torch.linspace(a, b, 40, dtype=torch.float64).sin().view(8, 5) for a, b in ((1, 7), (2, 30))
    )
    noise = Noise(torch.arange(8), (5,), dtype=torch.float64)
    x = (
        DDIM(eta)
        .advance(State(t.alpha * x0 + t.sigma * eps, t, (s,)), Prediction(x0, eps), noise)
        .x
    )
    for column, pair in enumerate(zip(before, after, strict=True)):
        if pair[0] == math.inf:
            torch.testing.assert_close(x[:, column], x0[:, column])
            continue
        a, b = map(schedule.at, pair)
        one = Prediction(x0[:, column], eps[:, column])
        column_noise = SimpleNamespace(
            between=lambda t, s, step, column=column: noise.step(step)[:, column]
        )
        expected = DDIM(eta).advance(State(one.at(a), a, (b,)), one, column_noise).x
        torch.testing.assert_close(x[:, column], expected, rtol=1e-12, atol=1e-12)
    half = (
        DDIM(eta)
        .advance(
            State(x.float(), t, (s,)),
            Prediction(x0.float(), eps.float()),
            Noise(torch.arange(8), (5,)),
        )
        .x
    )
    assert half.dtype == torch.float32


def test_fresh_noise_on_a_map_that_rises_anywhere_is_rejected():
    t, s = (Cosine().at(torch.tensor(v, dtype=torch.float64)) for v in ((0.0, 1.0), (0.5, 0.9)))
    with pytest.raises(ValueError, match="fall in noise"):
        DDIM(0.5).advance(State(X0, t, (s,)), Prediction(X0, EPS), NOISE)
