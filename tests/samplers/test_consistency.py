"""Samplers of few-step networks are exact in any number of steps, and refuse other networks."""

from dataclasses import replace

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.distillation.flow_map import FlowMap
from diffcore.evaluation.flow.exact_flow import solve_flow
from diffcore.evaluation.likelihood import flow_log_density
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, TCD, AlphaBlending, Consistency, Heun, Restart
from diffcore.sampling.generation import DEFAULT_SAMPLER, default_sampler, sample
from diffcore.sampling.loop import count_evaluations, integrate
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from tests.helpers.moments import moments
from tests.helpers.oracles import SCALINGS, covariance, flow, gaussian, mixture, process
from tests.helpers.products import covered

EYE = torch.eye(2, dtype=torch.float64)
COV = covariance(0.8, 0.2, 0.7)
INTERVAL = ((0.2, 0.8, 4, 2),)


def normal_oracle(scaling):
    return gaussian([1.0, -0.5], COV, process(Cosine(scaling=scaling), classes=0))


def knots_of(oracle, *logsnrs):
    return Explicit(logsnrs).knots(oracle.process.schedule, len(logsnrs) - 1)


def marginal(level):
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return level.alpha * mean, level.alpha**2 * COV + level.sigma**2 * EYE


STEPS = [
    (Consistency(), "consistency"),
    (Consistency(), "mean_velocity"),
    (TCD(1.0), "consistency"),
    *((TCD(gamma), "mean_velocity") for gamma in (0.0, 0.3, 1.0)),
    (DDIM(), "mean_velocity"),
]


@pytest.mark.parametrize(
    ("sampler", "estimate", "scaling"),
    covered([(*step, scaling) for step in STEPS for scaling in SCALINGS], count=8),
    ids=str,
)
def test_the_distribution_is_exact_in_one_and_in_three_uneven_steps(sampler, estimate, scaling):
    oracle = normal_oracle(scaling)
    denoiser = FlowMap(oracle, estimate, steps=16)
    for logsnrs in ((-6.0, 4.0), (-6.0, -1.0, 0.5, 4.0)):
        knots = knots_of(oracle, *logsnrs)
        mean, cov = moments(denoiser, sampler, knots, *marginal(knots[0]))
        expected = marginal(knots[-1])
        torch.testing.assert_close(mean, expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(cov, expected[1], atol=1e-5, rtol=0)


def test_tcd_with_less_noise_is_not_exact_for_a_network_of_one_time():
    """Its ε belongs to the clean end of the flow, and not to the level before the noise."""
    oracle = normal_oracle("vp")
    knots = knots_of(oracle, -6.0, -1.0, 0.5, 4.0)
    denoiser = FlowMap(oracle, "consistency", steps=32)
    _, cov = moments(denoiser, TCD(0.3), knots, *marginal(knots[0]))
    assert (cov - marginal(knots[-1])[1]).norm() > 0.01


@pytest.mark.parametrize("steps", (1, 2, 4))
def test_steps_of_the_mean_velocity_from_pure_noise_end_where_the_flow_ends(steps):
    oracle = mixture(process(Flow()))
    knots = Trailing().knots(oracle.process.schedule, steps)
    noise = Noise(torch.arange(8), (2,), dtype=torch.float64)
    x = noise.start()
    end, count = integrate(FlowMap(oracle, "mean_velocity"), DDIM(), x, knots, noise)
    torch.testing.assert_close(end, flow(oracle, x, knots[0], knots[-1]), atol=2e-6, rtol=0)
    assert count == count_evaluations(oracle.process, DDIM(), knots, CFG(1.0)) == steps


def test_a_consistency_step_is_the_end_of_the_flow_and_fresh_noise():
    oracle = mixture(process(Flow()))
    knots = knots_of(oracle, -4.0, 1.0, 3.0)
    noise = Noise(torch.arange(8), (2,), dtype=torch.float64)
    denoiser, sampler = FlowMap(oracle, "consistency"), Consistency()
    state = sampler.start(noise.start(), knots, noise)
    clean = flow(oracle, state.x, knots[0], oracle.process.schedule.at(torch.inf))
    after = sampler.advance(state, denoiser(state.x, state.level), noise)
    expected = knots[1].alpha * clean + knots[1].sigma * noise.between(knots[0], knots[1], 0)
    torch.testing.assert_close(after.x, expected, atol=1e-6, rtol=0)
    assert sampler.end(state).sigma == 0


def test_tcd_goes_below_the_knot_by_the_share_gamma_of_its_time():
    knots = Trailing().knots(Cosine(), 2)
    noise = Noise(torch.arange(2), (2,), dtype=torch.float64)
    state = TCD(0.3).start(noise.start(), knots, noise)
    assert TCD(0.3).end(state).t == pytest.approx(0.7 * 0.5)
    assert TCD(0.0).end(state) == knots[1]
    assert TCD(1.0).end(state).logsnr == torch.inf
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        TCD(1.5)


def test_the_default_sampler_is_one_that_is_right_for_the_process():
    oracle = mixture(process(Flow()))
    for estimate, sampler in {"consistency": Consistency(), "mean_velocity": DDIM()}.items():
        denoiser = FlowMap(oracle, estimate, steps=2)
        assert default_sampler(denoiser.process) == sampler
        drawn, expected = (
            sample(denoiser, chosen, Trailing(), 2, seeds=range(4), batch_size=4).x
            for chosen in (None, sampler)
        )
        assert torch.equal(drawn, expected)
    assert default_sampler(oracle.process) == DEFAULT_SAMPLER


WRONG = [
    ("posterior_mean", Consistency(), "DDIM"),
    ("posterior_mean", TCD(), "DDIM"),
    *(("consistency", s, "Consistency") for s in (DDIM(), Heun(), DEFAULT_SAMPLER)),
    *(("mean_velocity", s, "DDIM") for s in (DDIM(0.5), Heun(), AlphaBlending(1))),
    ("mean_velocity", Restart(DDIM(), INTERVAL), "DDIM"),
]


@pytest.mark.parametrize(("estimate", "sampler", "remedy"), WRONG, ids=str)
def test_a_sampler_that_reads_something_else_from_the_pair_is_refused(estimate, sampler, remedy):
    oracle = mixture(process(Flow()))
    denoiser = oracle if estimate == "posterior_mean" else FlowMap(oracle, estimate)
    with pytest.raises(ValueError, match=rf"estimate {estimate}.* use .*{remedy}"):
        sample(denoiser, sampler, Trailing(), 2, seeds=[0])


@pytest.mark.parametrize("estimate", ("consistency", "mean_velocity"))
def test_algorithms_that_need_the_posterior_mean_refuse_a_point_of_the_flow(estimate):
    denoiser = FlowMap(mixture(process(Flow())), estimate)
    refused = {
        "CFG": lambda: sample(
            denoiser, None, Trailing(), 2, seeds=[0], condition=[0], guidance=CFG(2.0)
        ),
        "likelihood": lambda: flow_log_density(denoiser, torch.zeros(1, 2)),
        "exact flow": lambda: solve_flow(denoiser, [0], None, CFG(1.0)),
        "flow map": lambda: FlowMap(denoiser, estimate),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match=rf"{name}.* needs E\[x_0 \| x\] at each level"):
            call()


def test_a_process_without_the_boundary_condition_is_refused():
    for estimate in ("consistency", "mean_velocity"):
        with pytest.raises(ValueError, match=r"prediction is sample.* use v_prediction"):
            Process(prediction="sample", estimate=estimate)
        with pytest.raises(ValueError, match="set variance to fixed"):
            Process(variance="learned", estimate=estimate)
    logsnr = replace(Process().time, variable="logsnr", scale=-0.125)
    assert Process(time=logsnr, estimate="consistency")
    with pytest.raises(ValueError, match=r"second level may be clean.* set a clamp"):
        Process(time=logsnr, estimate="mean_velocity")
    with pytest.raises(ValueError, match="estimate is 'mean', expected one of posterior_mean"):
        Process(estimate="mean")
