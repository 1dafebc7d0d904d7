"""Learned uncertainty: u(λ) converges to ln E[L | λ] and divides the loss of each level."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.uncertainty import LogVariance, Uncertainty
from diffcore.objectives.weighting import MinSNR

KEY = SampleKey(3, 1, torch.arange(12), 12)
PROCESS = Process(shape=(1, 2, 2))


class Scale(nn.Module):
    """A network with one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, time):
        return self.weight * x


def nonzero_module():
    """A module u(λ) that is not 0."""
    u = Uncertainty(16).module()
    nn.init.constant_(u.linear.weight, 0.1)
    nn.init.constant_(u.linear.bias, -0.4)
    return u


def test_it_is_0_at_initialisation_and_does_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    first = Uncertainty(32).module()
    torch.manual_seed(2)
    second = Uncertainty(32).module()
    logsnr = torch.linspace(-20, 20, 9)
    assert torch.equal(first(logsnr), torch.zeros(9))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert {name for name, _ in first.named_parameters()} == {"linear.weight", "linear.bias"}


def test_the_features_are_random_fourier_features_of_an_eighth_of_the_level():
    """MPFourier of EDM2 at ln(σ/α)/4 = -λ/8: √2 cos(2π(f λ/8 + φ)), with mean square 1."""
    u = nonzero_module()
    f, phase = (
        normal(0, Stream.MODEL, 0, (16,))[0].numpy(),
        uniform(0, Stream.MODEL, 1, 16)[0].numpy(),
    )
    logsnr = np.linspace(-12, 12, 25)
    expected = (0.1 * math.sqrt(2) * np.cos(2 * np.pi * (f * logsnr[:, None] / 8 + phase))).sum(
        1
    ) - 0.4
    np.testing.assert_allclose(
        u(torch.from_numpy(logsnr).float()).detach(), expected, rtol=1e-4, atol=1e-5
    )
    assert u(torch.tensor([math.inf, -math.inf])).isfinite().all()


def test_autocast_keeps_it_in_float32():
    u, logsnr = nonzero_module(), torch.linspace(-9, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(u(logsnr), u(logsnr).float())
        result = u(logsnr)
    assert torch.equal(result, u(logsnr))


@pytest.mark.parametrize(
    "expected", [lambda v: -v / 4 - 1, lambda v: np.tanh(v) * 2, lambda v: 0 * v + 3], ids=range(3)
)
def test_it_converges_to_the_logarithm_of_the_expected_loss(expected):
    """Trained on L = e^(expected) χ²/4 of 4 degrees of freedom, with λ uniform on ±8."""
    u = LogVariance(64)
    optimizer = torch.optim.Adam(u.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(0)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 500)
        logsnr = 8 * (2 * torch.rand(512, generator=generator) - 1)
        noise = torch.randn(512, 4, generator=generator).square().mean(1)
        losses = torch.from_numpy(np.exp(expected(logsnr.numpy()))) * noise
        value = u(logsnr)
        (losses / value.exp() + value).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    levels = torch.linspace(-7.5, 7.5, 61)
    error = u(levels).detach().numpy() - expected(levels.numpy())
    assert np.abs(error).max() < 0.25
    assert np.sqrt((error**2).mean()) < 0.1


def test_the_objective_divides_by_it_and_adds_it():
    objective = Objective(MinSNR(), uncertainty=Uncertainty(16))
    x0 = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    draw, denoiser, u = objective.draw(PROCESS, KEY), Denoiser(Scale(), PROCESS), nonzero_module()
    plain = Objective(MinSNR())(denoiser, x0, None, draw)
    value = u(draw.level.logsnr.flatten().float())
    assert value.abs().min() > 1e-3
    torch.testing.assert_close(
        objective(denoiser, x0, None, draw, u), plain * (-value).exp() + value
    )
    assert torch.equal(objective(denoiser, x0, None, draw), plain)  # without the module


def test_gradients_reach_the_network_and_the_uncertainty():
    objective = Objective(MinSNR(), uncertainty=Uncertainty(16))
    x0 = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    network, u, draw = Scale(), nonzero_module(), objective.draw(PROCESS, KEY)
    losses = Objective(MinSNR())(Denoiser(network, PROCESS), x0, None, draw)
    value = u(draw.level.logsnr.flatten().float()).detach()
    (expected,) = torch.autograd.grad((losses / value.exp()).sum(), network.weight)
    objective(Denoiser(network, PROCESS), x0, None, draw, u).sum().backward()
    torch.testing.assert_close(network.weight.grad, expected)
    torch.testing.assert_close(u.linear.bias.grad[0], (1 - losses.detach() / value.exp()).sum())
    assert (u.linear.weight.grad != 0).all()


def test_a_map_of_levels_has_the_uncertainty_of_its_mean():
    class Ones(nn.Module):
        def forward(self, x, time):
            return torch.ones_like(x)

    objective, u = Objective(MinSNR(), uncertainty=Uncertainty(16)), nonzero_module()
    level = PROCESS.schedule.level(torch.linspace(0.1, 0.9, 12).view(3, 1, 2, 2))
    draw = objective.draw(PROCESS, SampleKey(0, 0, torch.arange(3), 3))._replace(level=level)
    x0 = torch.zeros(3, 1, 2, 2)
    plain = objective(Denoiser(Ones(), PROCESS), x0, None, draw)
    value = u(level.logsnr.mean((1, 2, 3)).float())
    torch.testing.assert_close(
        objective(Denoiser(Ones(), PROCESS), x0, None, draw, u), plain / value.exp() + value
    )


@pytest.mark.parametrize("features", [0, -4])
def test_fewer_than_one_feature_is_refused(features):
    with pytest.raises(ValueError, match=f"features is {features}, expected at least 1"):
        Uncertainty(features)
