"""The variational bound of a process whose elements have levels of their own."""

import math

import pytest
import torch

from diffcore.core.denoiser import Denoiser
from diffcore.core.random import Stream, normal
from diffcore.evaluation.likelihood import variational_bound
from diffcore.schedules import Explicit, Trailing
from tests.helpers import learned_levels as helper

COVARIANCE = torch.tensor([[1.0, 0.7], [0.7, 0.8]], dtype=torch.float64)
X0 = (
    normal(5, 8, torch.arange(2000), (2,), dtype=torch.float64)
    @ torch.linalg.cholesky(COVARIANCE).mT
)


def exact_bits():
    data = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), COVARIANCE)
    return -data.log_prob(X0) / (2 * math.log(2))


@pytest.mark.parametrize("variance", [0.0, 0.4, None])
def test_equal_polynomials_of_all_elements_give_the_bound_of_the_scalar_schedule(variance):
    """At the same λ; a polynomial that is no identity moves the knots."""
    learned = helper.denoiser(COVARIANCE)
    coefficients = torch.tensor([0.7, -1.1, 0.9], dtype=torch.float64)
    with torch.no_grad():
        learned.network.levels.coefficients.copy_(coefficients[:, None])
    shared = Denoiser(helper.LinearNetwork(COVARIANCE), helper.process(2, "shared"))
    knots = Trailing().knots(helper.SCHEDULE, 6)
    moved = [float(k.logsnr if k is knots[-1] else k.logsnr[0, 0]) for k in _maps(learned, knots)]
    assert abs(moved[2] - knots[2].logsnr) > 0.1
    options = {"steps": 6, "variance": variance, "batch_size": 2000}
    found = variational_bound(learned, X0, **options)
    expected = variational_bound(shared, X0, grid=Explicit(tuple(moved)), **options)
    for part in ("bits", "prior", "transitions", "decoder"):
        torch.testing.assert_close(
            getattr(found, part), getattr(expected, part), rtol=1e-9, atol=1e-9
        )
    assert not found.latent.any()


def _maps(denoiser, knots):
    return denoiser.network.knots(knots, None)


def test_the_steps_have_the_loss_of_discrete_time_of_the_source():
    """½ Σ (e^(γ_t - γ_s) - 1) (ε - ε̂)² with γ = -λ of each element, for the variance β̃."""
    denoiser = helper.denoiser(0.3 * torch.eye(2, dtype=torch.float64), seed=2)
    found = variational_bound(denoiser, X0, steps=5, variance=0.0, batch_size=2000, seed=3)
    knots = _maps(denoiser, Trailing().knots(helper.SCHEDULE, 5))
    total = torch.zeros(len(X0), dtype=torch.float64)
    for index, (t, s) in enumerate(zip(knots[:-2], knots[1:-1], strict=True)):
        key = torch.arange(len(X0)) + (index << 32)
        eps = normal(3, Stream.BOUND, key, (2,), dtype=torch.float64)
        x = t.alpha * X0 + t.sigma * eps
        estimate = denoiser(x, t).eps
        total += ((s.logsnr - t.logsnr).expm1() * (eps - estimate).square()).sum(1) / 2
    torch.testing.assert_close(found.transitions * 2 * math.log(2), total)


@pytest.mark.parametrize("latent", [0, 2])
def test_the_bound_of_an_exact_denoiser_tends_to_the_exact_bits_and_those_of_the_latent(latent):
    """It contains KL(q(z | x_0) || N(0, I)) beside, since z tells an exact denoiser nothing."""
    denoiser = helper.denoiser(COVARIANCE, latent, seed=0)
    gaps = []
    for steps in (8, 128):
        found = variational_bound(denoiser, X0, steps=steps, batch_size=2000)
        gap = found.bits - found.latent - exact_bits()
        gaps.append((float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))))
        torch.testing.assert_close(
            found.bits, found.prior + found.transitions + found.decoder + found.latent
        )
        assert bool((found.latent > 0).all()) == bool(latent)
    (few, _), (many, error) = gaps
    assert few > 4 * error
    assert abs(many) < 3 * error < few


def test_the_bits_of_an_item_do_not_depend_on_the_batch():
    denoiser = helper.denoiser(COVARIANCE, latent=2, seed=0)
    whole = variational_bound(denoiser, X0[:10], steps=4)
    for size in (3, 4):
        parts = variational_bound(denoiser, X0[:10], steps=4, batch_size=size)
        torch.testing.assert_close(parts.bits, whole.bits, rtol=1e-6, atol=1e-7)
