"""Samplers equal diffusers' schedulers on the same knots, except where a scheduler has a defect.

The schedulers' tables of σ are overwritten with our knots in float64, so that only the steps are
compared.
"""

import math

import diffusers
import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, AdamsBashforth, AlphaBlending, DPMSolverPP, Euler, Heun, UniPC
from diffcore.schedules import Cosine, Explicit, Flow
from tests.helpers.oracles import flow, mixture, process

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # in set_timesteps of diffusers
LOGSNRS = (-7.0, -5.2, -4.0, -2.6, -1.5, -0.4, 0.6, 1.8, 3.1, 4.5, 6.0)
NOISE = Noise(torch.arange(64), (2,), dtype=torch.float64)


def knots(scaling, clean):
    logsnrs = (*LOGSNRS, math.inf) if clean else LOGSNRS
    return Explicit(logsnrs).knots(Cosine(scaling=scaling), len(logsnrs) - 1)


def states_of_scheduler(scheduler, knots):
    """x after each step of a diffusers scheduler; schedulers that follow EDM step y = x/α."""
    scheduler.set_timesteps(len(knots) - 1)
    sigmas, evaluated = (
        [0.0 if knot.logsnr == math.inf else knot.ratio for knot in knots],
        knots[:-1],
    )
    if isinstance(scheduler, diffusers.HeunDiscreteScheduler):  # its table has inner knots twice
        sigmas, evaluated = (
            [levels[0], *(level for level in levels[1:-1] for _ in range(2)), *levels[-1:]]
            for levels in (sigmas, knots)
        )
        evaluated = evaluated[:-1]
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    oracle, x, states = mixture(), knots[0].sigma * NOISE.start(), []
    for t, level in zip(scheduler.timesteps, evaluated, strict=True):
        scheduler.scale_model_input(x, t)  # some schedulers require this call
        x0, eps = oracle(x.double(), level)
        output = eps if scheduler.config.prediction_type == "epsilon" else x0
        x = scheduler.step(output, t, x).prev_sample
        states.append(x.double())
    return states


def states_of_sampler(sampler, knots):
    """x after each step of our sampler."""
    state, oracle, states = (
        sampler.start(knots[0].sigma * NOISE.start(), knots, NOISE),
        mixture(),
        [],
    )
    while not state.done:
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
        states.append(state.x)
    return states


def dpm(order, solver_type="midpoint", **config):
    return diffusers.DPMSolverMultistepScheduler(
        solver_order=order, solver_type=solver_type, prediction_type="sample", **config
    )


def unipc(order, solver_type, **config):
    return diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=solver_type, prediction_type="sample", **config
    )


def deis(order):
    return diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type="sample", lower_order_final=False
    )


NOISY = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
# scheduler, scaling, whether the last knot is clean, sampler, tolerance (5e-6 if it uses float32)
EQUAL = {
    "Euler": (diffusers.EulerDiscreteScheduler, "ve", True, Euler(), 5e-6),
    "Heun": (diffusers.HeunDiscreteScheduler, "ve", True, Heun(), 1e-12),
    "LMS": (diffusers.LMSDiscreteScheduler, "ve", False, AdamsBashforth.lms(4), 1e-12),
    "DPM++ 1": (lambda: dpm(1), "vp", True, DPMSolverPP("1"), 5e-6),
    "DPM++ 2M": (lambda: dpm(2), "vp", True, DPMSolverPP("2M"), 5e-6),
    "DPM++ 2M, noisy": (lambda: dpm(2, **NOISY), "vp", False, DPMSolverPP("2M"), 5e-6),
    "DPM++ 2M heun": (lambda: dpm(2, "heun"), "vp", True, AdamsBashforth(2, "x0", "logsnr"), 5e-6),
    "DPM++ 3M": (lambda: dpm(3, "heun", **NOISY), "vp", False, DPMSolverPP("3M published"), 5e-6),
    **{
        f"UniPC {p}, clean": (lambda p=p: unipc(p, "bh2"), "vp", True, UniPC(p), 1e-12)
        for p in (1, 2)
    },
    **{
        f"UniPC {p} {B}": (lambda p=p, B=B: unipc(p, B, **NOISY), "vp", False, UniPC(p, B), 1e-12)
        for p in (1, 2, 3)
        for B in ("bh1", "bh2")
    },
    **{
        f"DEIS {k}": (lambda k=k: deis(k), "vp", False, AdamsBashforth.deis(k), 1e-12)
        for k in (1, 2, 3)
    },
}


@pytest.mark.parametrize("name", EQUAL)
def test_every_state_equals_diffusers(name):
    make, scaling, clean, sampler, tolerance = EQUAL[name]
    levels = knots(scaling, clean)
    for mine, other in zip(
        states_of_sampler(sampler, levels), states_of_scheduler(make(), levels), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sampler", (DDIM(), Euler(), AdamsBashforth.flow(1), AlphaBlending(1)), ids=str
)
def test_flow_euler_equals_diffusers_from_noise_to_data(sampler):
    """The σ of this scheduler is our a; it steps in float32."""
    blends = [1.0, 0.93, 0.8, 0.55, 0.31, 0.1, 0.0]
    schedule, oracle = Flow(), mixture(process(Flow()))
    levels = tuple(schedule.level(a) for a in blends)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=blends[:-1])
    x = NOISE.start()
    for t, level in zip(scheduler.timesteps, levels, strict=False):
        x0, eps = oracle(x.double(), level)
        x = scheduler.step(eps - x0, t, x).prev_sample
    state = sampler.start(NOISE.start(), levels, NOISE)
    while not state.done:
        state = sampler.advance(state, oracle(state.x, state.level), NOISE)
    torch.testing.assert_close(state.x, x.double(), rtol=1e-5, atol=1e-5)


def distance(states, levels):
    """Median distance of the last state to the exact flow."""
    exact = flow(mixture(), levels[0].sigma * NOISE.start(), levels[0], levels[-1])
    return (states[-1] - exact).norm(dim=1).median().item()


def test_dpm_solver_3m_is_closer_to_the_flow_than_its_published_form():
    """Over 60 steps of λ from -6 to 4, the distances are 1.4e-4 (published) and 1.9e-5."""
    levels = Explicit(tuple(-6 + i / 6 for i in range(61))).knots(Cosine(), 60)
    published, true = (
        distance(states_of_sampler(DPMSolverPP(v), levels), levels) for v in ("3M published", "3M")
    )
    assert distance(states_of_scheduler(dpm(3, "heun", **NOISY), levels), levels) == pytest.approx(
        published, rel=0.02
    )
    assert true < published / 3


def test_unipc_bh1_is_finite_at_the_clean_level_and_nan_in_diffusers():
    """B(h) = h is infinite at the clean level.

    At order 3 and below 15 steps, diffusers lowers the order of the last two steps.
    """
    levels = knots("vp", True)
    assert states_of_scheduler(unipc(2, "bh1"), levels)[-1].isnan().all()
    assert states_of_sampler(UniPC(2, "bh1"), levels)[-1].isfinite().all()
    other, mine = states_of_scheduler(unipc(3, "bh2"), levels), states_of_sampler(UniPC(3), levels)
    torch.testing.assert_close(mine[-3], other[-3], rtol=1e-12, atol=1e-12)
    assert 0.01 < (mine[-1] - other[-1]).abs().max() < 1
