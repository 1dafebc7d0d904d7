"""Losses of the network's error are twice scipy's, e² for small e, and accurate in float32."""

import math

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.losses import Huber, PseudoHuber, SquaredError
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE, MinSNR

ERRORS = np.concatenate((-np.logspace(-6, 4, 41)[::-1], [0.0], np.logspace(-6, 4, 41)))
DELTAS = [0.01, 0.3, 1.0, 5.0]


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(
    ("loss", "formula"), [(Huber, special.huber), (PseudoHuber, special.pseudo_huber)]
)
def test_robust_losses_are_twice_those_of_scipy(loss, formula, delta):
    result = loss(delta)(torch.from_numpy(ERRORS))
    # For smaller errors, scipy's pseudo_huber loses its digits to cancellation.
    accurate = np.abs(ERRORS) > 1e-3 * delta
    np.testing.assert_allclose(
        result.numpy()[accurate], 2 * formula(delta, ERRORS)[accurate], rtol=1e-8
    )


@pytest.mark.parametrize("loss", [SquaredError(), Huber(0.5), PseudoHuber(0.5)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_a_small_error_is_its_square_to_the_last_bits(loss, dtype):
    """The difference √(1 + (e/δ)²) - 1 is 0 in float32 for e below 3e-4 δ."""
    error = torch.logspace(-15, -5, 60, dtype=dtype)
    torch.testing.assert_close(
        loss(error), error**2, rtol=1e-6 if dtype == torch.float32 else 2e-10, atol=0
    )


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(("loss", "minimum"), [(Huber, 1.0), (PseudoHuber, 0.999)])
def test_gradients_are_bounded_and_odd(loss, minimum, delta):
    error = torch.from_numpy(ERRORS).requires_grad_()
    (slope,) = torch.autograd.grad(loss(delta)(error).sum(), error)
    torch.testing.assert_close(slope, -slope.flip(0), rtol=1e-12, atol=0)
    assert slope.abs().max() <= 2 * delta * (1 + 1e-12)
    assert slope[-1] >= 2 * delta * minimum
    assert slope[41] == 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("loss", [Huber, PseudoHuber])
def test_a_width_that_is_not_positive_is_refused(loss, value):
    with pytest.raises(ValueError, match=f"delta is {value}, expected a positive finite error"):
        loss(value)


class Cosines(nn.Module):
    """A network in closed form."""

    def forward(self, x, time):
        return x.cos()


@pytest.mark.parametrize("loss", [SquaredError(), Huber(0.3), PseudoHuber(0.3)], ids=repr)
def test_the_objective_applies_the_loss_to_each_element_of_the_error(loss):
    """The loss is w_F mean ρ(F̂ - F) over elements; the default ρ is the squared error."""
    process = Process(shape=(1, 3, 3), prediction="epsilon")
    x0 = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    objective = Objective(MinSNR(), loss=loss)
    draw = objective.draw(process, SampleKey(0, 0, torch.arange(6), 6))
    x = draw.level.alpha * x0 + draw.level.sigma * draw.noise
    cost = loss(x.cos() - draw.noise).mean((1, 2, 3))
    expected = (5 / draw.level.logsnr.exp()).clamp(max=1).flatten() * cost
    losses = objective(Denoiser(Cosines(), process), x0, None, draw)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    assert Objective().loss == SquaredError()
    assert Objective().weight == MSE("v_prediction")
