"""The stochastic form of gradient estimation equals the published code and DDPM."""

import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.samplers import DDIM, GradientEstimation
from diffcore.sampling.loop import integrate
from diffcore.schedules import Cosine, Explicit, Flow, Trailing
from tests.helpers.oracles import SCALINGS, mixture, process

NOISE = Noise(torch.arange(16), (2,), dtype=torch.float64)
LOGSNRS = (-6.0, -3.5, -2.0, 0.0, 1.0, 3.0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("gamma", "mu"), [(1.0, 0.5), (2.0, 0.5), (2.0, 0.2), (1.6, 0.9)])
def test_a_run_equals_the_published_code(gamma, mu, scaling):
    """smalldiffusion, in the ve scaling, with σ_p = (σ'/σ^μ)^(1/(1-μ)), η = √(σ'² - σ_p²):

    x' = x - (σ - σ_p) ε̄ + η z
    """
    ve = mixture(process(Cosine(scaling="ve")))
    knots = Explicit(LOGSNRS).knots(ve.process.schedule, 5)
    y, last = knots[0].sigma * NOISE.start(), None
    for i in range(5):
        sigma, after = (math.exp(-logsnr / 2) for logsnr in LOGSNRS[i : i + 2])
        eps = ve(y, knots[i]).eps
        average = eps if last is None else gamma * eps + (1 - gamma) * last
        sigma_p = (after / sigma**mu) ** (1 / (1 - mu))
        y, last = (
            y - (sigma - sigma_p) * average + math.sqrt(after**2 - sigma_p**2) * NOISE.step(i),
            eps,
        )
    oracle = mixture(process(Cosine(scaling=scaling)))
    knots = Explicit(LOGSNRS).knots(oracle.process.schedule, 5)
    x, _ = integrate(
        oracle, GradientEstimation(gamma, mu), knots[0].sigma * NOISE.start(), knots, NOISE
    )
    torch.testing.assert_close(x / knots[-1].alpha, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", (Cosine(), Flow()), ids=str)
def test_gamma_1_and_mu_half_is_ddpm_from_pure_noise_to_data(schedule):
    """DDIM at η = 1 is DDPM; it replaces all noise at α = 0 and adds none at the clean level."""
    oracle, knots = mixture(process(schedule)), Trailing().knots(schedule, 7)
    one, other = (
        integrate(oracle, s, NOISE.start(), knots, NOISE)[0]
        for s in (GradientEstimation(1.0, 0.5), DDIM(1.0))
    )
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_fresh_noise_on_knots_that_rise_in_noise_is_rejected():
    with pytest.raises(ValueError, match="mu = 0"):
        GradientEstimation(2.0, 0.5).start(
            NOISE.start(), Explicit(LOGSNRS[::-1]).knots(Cosine(), 5), NOISE
        )
