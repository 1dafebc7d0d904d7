"""The variational bound of a process with a learned encoder of x_0."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.evaluation.likelihood import bound, variational_bound
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.schedules import LogLinear, Trailing
from tests.helpers import encoded_mean as helper

CASES = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.8), (0.5, -0.7)]


@pytest.mark.parametrize("variance", [0.0, 0.4, None])
@pytest.mark.parametrize("bins", [None, 5])
def test_the_identity_gives_the_bound_of_the_process_without_an_encoder(variance, bins):
    torch.manual_seed(0)
    part = Perceptron([2], 8)
    nn.init.normal_(part.last.weight, std=0.3)
    network = MeanEncoderNetwork(lambda: part, lambda: Perceptron([2], 8), share=1.0).double()
    schedule = LogLinear(-5.0, 7.0)
    encoded = Denoiser(network, Process(schedule, shape=(2,), estimate="encoded_mean"))
    plain = Denoiser(network.network, Process(schedule, shape=(2,)))
    x0 = torch.tensor([[-1.0, 0.5], [0.0, 1.0], [-0.5, -0.5]], dtype=torch.float64)
    found, expected = (
        variational_bound(each, x0, bins, steps=9, variance=variance) for each in (encoded, plain)
    )
    for name in ("bits", "prior", "transitions", "decoder", "latent"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9
        )


def exact_terms(network, steps):
    """L_T, the steps and L_0 in nats with the variance β̃, of an exact denoiser of normal data."""
    knots = Trailing().knots(helper.SCHEDULE, steps)
    s2 = network.variance

    def linear(logsnr):
        return network.share + (1 - network.share) / (1 + math.exp(-logsnr))

    first = knots[0]
    content = first.alpha**2 * network.factors(first.logsnr)[0] ** 2 * s2
    prior = (content + first.sigma**2 - 1 - math.log(first.sigma**2)) / 2
    total = 0.0
    for t, s in pairwise(knots[:-1]):
        (now, _, _), (after, _, _) = network.factors(t.logsnr), network.factors(s.logsnr)
        r2 = math.exp(t.logsnr - s.logsnr)
        ratio = linear(s.logsnr) / linear(t.logsnr)
        # μ_q - μ = α_s [(M_s - r² M_t) x_0 - (m_s/m_t - r²) x̂_φ],   x̂_φ = K x
        own, gain = after - r2 * now, (ratio - r2) * network.weight(t.logsnr)
        error = (own - gain * t.alpha * now) ** 2 * s2 + gain**2 * t.sigma**2
        total += s.alpha**2 * error / (2 * s.sigma**2 * (1 - r2))
    before, last = knots[-3], knots[-2]
    variance = last.sigma**2 * -math.expm1(before.logsnr - last.logsnr)
    gain = network.weight(last.logsnr) / linear(last.logsnr)
    now, _, _ = network.factors(last.logsnr)
    error = (1 - gain * last.alpha * now) ** 2 * s2 + gain**2 * last.sigma**2
    return prior, total, (error / variance + math.log(2 * math.pi * variance)) / 2


@pytest.mark.parametrize(("share", "gain"), CASES)
def test_the_terms_of_an_exact_denoiser_are_those_in_closed_form(share, gain, monkeypatch):
    """The terms are quadratic in x_0 and ε, of which signs have the moments."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    eps = signs.repeat(2)[:, None]
    monkeypatch.setattr(bound, "normal", lambda *arguments: eps)
    denoiser = helper.denoiser(share, gain)
    x0 = math.sqrt(denoiser.network.variance) * signs.repeat_interleave(2)[:, None]
    found = variational_bound(denoiser, x0, steps=11, variance=0.0, batch_size=4)
    parts = (found.prior, found.transitions, found.decoder)
    for part, expected in zip(parts, exact_terms(denoiser.network, 11), strict=True):
        assert float(part.mean()) * math.log(2) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("share", "gain"), CASES)
def test_the_steps_tend_to_the_bound_in_continuous_time(share, gain):
    network = helper.denoiser(share, gain).network
    limit = helper.diffusion_integral(network)
    gaps = [exact_terms(network, steps)[1] - limit for steps in (500, 1000)]
    assert abs(gaps[1]) < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)
