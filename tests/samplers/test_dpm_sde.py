"""DPM-Solver++ for the SDE equals its integral, its special cases, and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from scipy.integrate import quad

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, target
from diffcore.samplers import DDIM, DPMSolverSDE, State
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Trailing
from tests.helpers.oracles import flow, mixture, process

NOISE = Noise(torch.arange(8), (2,), dtype=torch.float64)
EPS = torch.linspace(2, 30, 16, dtype=torch.float64).sin().view(8, 2)
LOGSNRS = (-3.0, -2.1, -0.5, 0.6)


def polynomial(logsnr, degree):
    """A polynomial in λ, used as the prediction of x_0."""
    return torch.stack(
        [(k + 1) * torch.ones(8, 2, dtype=torch.float64) * logsnr**k for k in range(degree + 1)]
    ).sum(0)


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("steps", (1, 2, 3))
def test_a_step_is_the_integral_of_the_polynomial_through_the_last_predictions(steps, eta):
    """The step is exact for an x_0 that is a polynomial of degree steps-1 in λ."""
    sampler, levels = DPMSolverSDE(steps, eta, "heun"), [Cosine().at(logsnr) for logsnr in LOGSNRS]
    state = State(EPS, levels[0], tuple(levels[1:]))
    for _ in range(3):
        t, s = state.level, state.remaining[0]
        x, step = state.x, state.step
        x0 = polynomial(t.logsnr, steps - 1)
        state = sampler.advance(state, Prediction(x0, (x - t.alpha * x0) / t.sigma), NOISE)
    h = (s.logsnr - t.logsnr) / 2
    weights = [
        quad(
            lambda tau, k=k: (
                (1 + eta) * math.exp(-(1 + eta) * (h - tau)) * (t.logsnr + 2 * tau) ** k
            ),
            0,
            h,
        )[0]
        for k in range(steps)
    ]
    expected = s.sigma / t.sigma * math.exp(-eta * h) * x + s.alpha * np.dot(
        weights, range(1, steps + 1)
    )
    expected = expected + s.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * NOISE.step(step)
    torch.testing.assert_close(state.x, expected, rtol=1e-10, atol=1e-10)


def test_one_prediction_is_ddim():
    oracle = mixture()
    knots = Trailing().knots(oracle.process.schedule, 6)
    for eta in (0.0, 1.0):
        ends = [
            integrate(oracle, sampler, NOISE.start(), knots, NOISE)[0]
            for sampler in (DPMSolverSDE(1, eta), DDIM(eta))
        ]
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", (2, 3))
def test_without_noise_it_is_the_multistep_solver_of_the_flow_at_its_full_order(steps):
    oracle, errors = mixture(), []
    schedule = oracle.process.schedule
    x = (
        schedule.at(-14.0).sigma * NOISE.start()
    )  # so noisy that x_0 is constant, and the first-order start has no error
    exact = flow(oracle, x, schedule.at(-14.0), schedule.at(4.0))
    for n in (256, 512):
        knots = Explicit(tuple(-14 + 18 * i / n for i in range(n + 1))).knots(schedule, n)
        errors.append(
            (integrate(oracle, DPMSolverSDE(steps, 0.0), x, knots, NOISE)[0] - exact)
            .norm(dim=1)
            .median()
        )
    assert DPMSolverSDE(steps, 0.0).order == steps
    assert torch.log2(errors[0] / errors[1]) == pytest.approx(steps, abs=0.15)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' own use of numpy
@pytest.mark.parametrize("solver", ("midpoint", "heun"))
@pytest.mark.parametrize("steps", (10, 25))
def test_2m_equals_diffusers_sde(solver, steps):
    """The tolerance is 1e-4 because the table of diffusers is float32.

    Both take the first-order step to the clean level.
    """
    theirs = DPMSolverMultistepScheduler(
        1000,
        1e-4,
        0.02,
        "linear",
        algorithm_type="sde-dpmsolver++",
        solver_type=solver,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    oracle = mixture(process(Discrete()))
    knots = Trailing().knots(oracle.process.schedule, steps)
    assert [round(1000 * knot.t) - 1 for knot in knots[:-1]] == theirs.timesteps.tolist()
    sampler = DPMSolverSDE(2, 1.0, solver)
    state, x = sampler.start(NOISE.start(), knots, NOISE), NOISE.start().float()
    for t in theirs.timesteps:
        output = target("epsilon", *oracle(x.double(), state.level), state.level, 0.5)
        x = theirs.step(output.float(), t, x, variance_noise=NOISE.step(state.step)).prev_sample
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
        torch.testing.assert_close(state.x.float(), x, rtol=1e-4, atol=1e-4)


def test_the_prediction_at_pure_noise_is_not_kept():
    oracle = mixture()
    knots = Trailing().knots(oracle.process.schedule, 4)
    sampler = DPMSolverSDE(3)
    state, remembered = sampler.start(NOISE.start(), knots, NOISE), []
    while not state.done:
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
        remembered.append([logsnr for logsnr, _ in state.memory or ()])
    levels = [knot.logsnr for knot in knots]
    assert remembered == [[], [levels[1]], [levels[2], levels[1]], []]
    assert state.x.isfinite().all()


def test_noise_may_increase_only_with_eta_0():
    oracle = mixture()
    knots = Explicit(tuple(4 - i / 20 for i in range(161))).knots(oracle.process.schedule, 160)
    x = oracle.sample(torch.arange(8))
    exact = flow(oracle, x, knots[0], knots[-1])
    assert (integrate(oracle, DPMSolverSDE(2, 0.0), x, knots, NOISE)[0] - exact).norm(
        dim=1
    ).median() < 1e-3
    with pytest.raises(ValueError, match="fall in noise"):
        integrate(oracle, DPMSolverSDE(2), x, knots, NOISE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "steps is 0"),
        ((4,), "steps is 4"),
        ((2, -1.0), "eta is"),
        ((2, math.inf), "eta is"),
        ((2, 1.0, "euler"), "solver"),
    ],
)
def test_options_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverSDE(*arguments)
