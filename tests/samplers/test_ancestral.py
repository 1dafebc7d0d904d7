"""DDPM and Euler ancestral equal the formulas of their papers, and diffusers on the same noise."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, target
from diffcore.samplers import (
    DDIM,
    DDPM,
    AlphaBlending,
    DPMSolverPP,
    EulerAncestral,
    Heun,
    State,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Discrete, Explicit, Leading, Trailing
from tests.helpers.oracles import mixture, process

NOISE = Noise(torch.arange(8), (2,), dtype=torch.float64)
X0, EPS = (
    torch.linspace(a, b, 16, dtype=torch.float64).sin().view(8, 2) for a, b in ((1, 7), (2, 30))
)
PAIRS = ((-9.0, -2.0), (-1.0, 0.5), (2.0, 6.0))


def step(sampler, scaling, t, s):
    t, s = (Cosine(scaling=scaling).at(logsnr) for logsnr in (t, s))
    return (
        t,
        s,
        sampler.advance(
            State(t.alpha * X0 + t.sigma * EPS, t, (s,), step=3), Prediction(X0, EPS), NOISE
        ).x,
    )


@pytest.mark.parametrize("variance", (0.0, 0.3, 1.0))
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_a_step_is_the_posterior_of_ddpm_with_its_variance(t, s, variance):
    """The mean is eq. 7 of 2006.11239, the variance iDDPM's exp(v ln β + (1-v) ln β̃)."""
    t, s, x = step(DDPM(variance), "vp", t, s)
    bar_t, bar_s = t.alpha**2, s.alpha**2
    beta = 1 - bar_t / bar_s
    small = (1 - bar_s) / (1 - bar_t) * beta
    mean = math.sqrt(bar_s) * beta / (1 - bar_t) * X0 + math.sqrt(bar_t / bar_s) * (1 - bar_s) / (
        1 - bar_t
    ) * (t.alpha * X0 + t.sigma * EPS)
    spread = math.exp((variance * math.log(beta) + (1 - variance) * math.log(small)) / 2)
    torch.testing.assert_close(x, mean + spread * NOISE.step(3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", ("ve", "flow"))
@pytest.mark.parametrize("variance", (0.3, 1.0))
def test_the_step_is_the_same_in_every_scaling(variance, scaling):
    _, _, vp = step(DDPM(variance), "vp", -1.0, 0.5)
    _, s, other = step(DDPM(variance), scaling, -1.0, 0.5)
    torch.testing.assert_close(other / math.hypot(s.alpha, s.sigma), vp, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", (0.0, 1.0))
def test_a_step_from_pure_noise_replaces_all_noise_and_a_step_to_clean_adds_none(variance):
    _, s, x = step(DDPM(variance), "vp", -math.inf, -2.0)
    spread = 1.0 if variance else s.sigma  # β = 1 - ᾱ_t/ᾱ_s = 1
    torch.testing.assert_close(x, s.alpha * X0 + spread * NOISE.step(3), rtol=1e-12, atol=1e-12)
    assert torch.equal(step(DDPM(variance), "vp", -2.0, math.inf)[2], X0)


def test_small_variance_and_euler_ancestral_are_ddim_with_eta_1_bit_for_bit():
    oracle = mixture()
    knots = Trailing().knots(oracle.process.schedule, 7)
    ends = [
        integrate(oracle, sampler, NOISE.start(), knots, NOISE)[0]
        for sampler in (DDIM(1.0), DDPM(), EulerAncestral())
    ]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("eta", (0.4, 1.0))
def test_euler_ancestral_steps_down_and_adds_noise(eta):
    """k-diffusion's σ_down and σ_up, in y = x/α."""
    t, s, x = step(EulerAncestral(eta), "ve", -1.0, 0.5)
    up = eta * s.sigma * math.sqrt(1 - s.sigma**2 / t.sigma**2)
    down = math.sqrt(s.sigma**2 - up**2)
    expected = X0 + t.sigma * EPS + (down - t.sigma) * EPS + up * NOISE.step(3)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


class GeneratorNoise:
    """Noise of a torch generator seeded with the index of the step, as used for diffusers."""

    def between(self, t, s, step):
        return torch.randn(8, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def compare_steps(theirs, sampler, steps, to_theirs):
    """x of diffusers and ours after each step from the same x, with the same denoiser."""
    oracle = mixture(process(Discrete()))
    knots = Trailing().knots(oracle.process.schedule, steps)
    theirs.set_timesteps(steps)
    state = sampler.start(NOISE.start(), knots, GeneratorNoise())
    x = to_theirs(NOISE.start(), knots[0])
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(x, t)
        output = target("epsilon", *oracle(state.x, state.level), state.level, 0.5)
        x = theirs.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        state = sampler.advance(state, oracle(state.x, state.level), GeneratorNoise())
        yield x, to_theirs(state.x, state.level)
        x = to_theirs(
            state.x, state.level
        )  # each step starts from our x, since the table of diffusers is float32


TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


@pytest.mark.parametrize(("name", "variance"), (("fixed_small", 0.0), ("fixed_large", 1.0)))
def test_steps_equal_diffusers_ddpm_except_for_the_noise_that_it_adds_to_the_result(name, variance):
    theirs = DDPMScheduler(
        **TABLE, variance_type=name, clip_sample=False, timestep_spacing="trailing"
    )
    *steps, (x, ours) = compare_steps(theirs, DDPM(variance), 10, lambda x, level: x)
    for theirs_x, ours_x in steps:
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-5, atol=1e-5)
    last = Trailing().knots(Discrete(), 10)[
        -2
    ]  # from there to clean β = 1 - ᾱ, 0.32² at 10 steps; β̃ = 0
    left = variance * last.sigma * GeneratorNoise().between(last, None, 9)
    torch.testing.assert_close(x - ours, left, rtol=1e-5, atol=1e-5)


def test_a_learned_variance_is_that_of_diffusers_learned_range_at_each_step():
    theirs = DDPMScheduler(
        **TABLE, variance_type="learned_range", clip_sample=False, timestep_spacing="leading"
    )
    theirs.set_timesteps(10)
    raw = torch.linspace(-1.2, 1.2, 2, dtype=torch.float64).expand(8, 2)
    oracle, knots = mixture(process(Discrete())), Leading().knots(Discrete(), 10)
    x = NOISE.start()
    for i, t in enumerate(theirs.timesteps):
        level, state = knots[i], State(x, knots[i], knots[i + 1 :], i)
        prediction = replace(oracle(x, level), variance=(raw + 1) / 2)
        output = torch.cat([prediction.eps, raw], 1)
        generator = torch.Generator().manual_seed(i)
        expected = theirs.step(output, t, x, generator=generator).prev_sample
        x = DDPM().advance(state, prediction, GeneratorNoise()).x
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        if i < 9:
            fixed = DDPM(0.3).advance(state, prediction, GeneratorNoise()).x
            assert not torch.equal(x, fixed)  # a number replaces the network's v


def test_samplers_without_a_variance_do_not_read_a_learned_one():
    oracle, knots = mixture(), Trailing().knots(Cosine(), 4)
    x = NOISE.start()
    for sampler in (DDIM(), DDIM(1.0), DDPM(0.0), Heun(), DPMSolverPP("2M"), AlphaBlending(2)):
        ends = []
        for variance in (None, 3.0 * torch.ones_like(x)):
            state = sampler.start(x, knots, NOISE)
            while not state.done:
                prediction = replace(oracle(state.x, state.level), variance=variance)
                state = sampler.advance(state, prediction, NOISE)
            ends.append(state.x)
        assert torch.equal(*ends)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' own use of numpy
@pytest.mark.parametrize("steps", (10, 25))
def test_steps_equal_diffusers_euler_ancestral(steps):
    """The scheduler of diffusers works in y = x/α."""
    theirs = EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    for x, ours in compare_steps(theirs, EulerAncestral(), steps, lambda x, level: x / level.alpha):
        torch.testing.assert_close(ours, x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variance", (-0.1, 1.1, math.nan))
def test_variances_outside_0_to_1_are_rejected(variance):
    with pytest.raises(ValueError, match="variance is"):
        DDPM(variance)


@pytest.mark.parametrize("sampler", (DDPM(), DDPM(1.0), EulerAncestral()), ids=str)
def test_knots_that_rise_in_noise_are_rejected(sampler):
    knots = Explicit((1.0, -1.0)).knots(Cosine(), 1)
    with pytest.raises(ValueError, match="fall in noise"):
        integrate(mixture(), sampler, NOISE.start(), knots, NOISE)
