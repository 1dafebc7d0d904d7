"""The loss that trains an encoder of x_0, against the bound of normal data in closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.networks import MeanEncoderNetwork, Perceptron
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO, MSE
from diffcore.schedules import LogLinear
from tests.helpers import encoded_mean as helper

BOUND = Objective(ELBO(), corrected=True)
CASES = [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.0, 0.8), (0.5, -0.7)]
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def exact_losses(denoiser, logsnr):
    """The mean loss at each λ: it is quadratic in x_0 and ε, of which signs have the moments."""
    x0 = (SIGNS[:, :1] * math.sqrt(denoiser.network.variance)).repeat(len(logsnr), 1)
    eps = SIGNS[:, 1:].repeat(len(logsnr), 1)
    level = helper.SCHEDULE.at(logsnr.repeat_interleave(4)[:, None])
    width = helper.SCHEDULE.high - helper.SCHEDULE.low
    importance = torch.full((len(x0),), width, dtype=torch.float64)
    none = torch.zeros(len(x0), dtype=torch.bool)
    draw = Draw(level, eps, none, importance)
    return BOUND(denoiser, x0, None, draw).view(-1, 4).mean(1)


def prior(network):
    """KL(N(α x_φ, σ²) || N(0, 1)) at the noisiest level, of normal data."""
    factor, _, _ = network.factors(helper.SCHEDULE.low)
    alpha2 = 1 / (1 + math.exp(-helper.SCHEDULE.low))
    sigma2 = 1 - alpha2
    square = alpha2 * factor**2 * network.variance
    return (square + sigma2 - 1 - math.log(sigma2)) / 2


@pytest.mark.parametrize(("share", "gain"), CASES)
def test_the_loss_of_an_exact_denoiser_is_the_bound_in_closed_form(share, gain):
    denoiser = helper.denoiser(share, gain)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    logsnr = torch.from_numpy(helper.SCHEDULE.low + 6 * (nodes + 1))
    found = float(exact_losses(denoiser, logsnr) @ torch.from_numpy(weights)) / 2
    expected = helper.diffusion_integral(denoiser.network) + prior(denoiser.network)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_bound_of_a_linear_encoder_is_the_entropy_and_a_gap(share):
    """½ ln (1 + SNR m² s²) between the ends, and ½ ∫ SNR m² k² E(x_0 - E[x_0 | x])² dλ.

    The gap is 0 without an encoder: only there the steps have the variance of the process.
    """
    network = helper.denoiser(share).network

    def term(logsnr):
        return math.log1p(math.exp(logsnr) * network.factors(logsnr)[0] ** 2 * network.variance) / 2

    def gap(logsnr):
        _, slope, _ = network.factors(logsnr)
        return math.exp(logsnr) * slope**2 * network.error(logsnr) / 2

    excess = quad(gap, network.low, network.high, epsabs=1e-11)[0]
    entropy = term(network.high) - term(network.low)
    assert helper.diffusion_integral(network) == pytest.approx(entropy + excess, abs=1e-7)
    assert (excess > 0.01) == (share < 1)


def test_no_other_denoiser_has_a_lower_loss_than_the_exact_one():
    denoiser = helper.denoiser(0.3, 0.8)
    logsnr = torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)
    exact, weight = exact_losses(denoiser, logsnr), denoiser.network.weight
    for change in (-1e-3, 1e-3):
        denoiser.network.weight = lambda value, change=change: weight(value) + change
        assert (exact_losses(denoiser, logsnr) > exact).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "edm"])
def test_the_loss_does_not_depend_on_what_the_network_predicts(prediction):
    """Networks whose outputs stand for the same x̂_φ."""
    torch.manual_seed(0)
    encoder = Perceptron([2], 8)
    nn.init.normal_(encoder.last.weight, std=0.3)
    schedule, losses = LogLinear(-5.0, 7.0), []
    x0, eps = torch.randn(2, 5, 2, dtype=torch.float64)
    for kind in ("sample", prediction):
        process = Process(schedule, kind, shape=(2,), estimate="encoded_mean")
        network = MeanEncoderNetwork(lambda kind=kind: Estimate(kind, schedule), lambda: encoder)
        denoiser = Denoiser(network.double(), process)
        key = SampleKey(0, 0, torch.arange(5), 5)
        losses.append(BOUND(denoiser, x0, None, BOUND.draw(process, key)._replace(noise=eps)))
    torch.testing.assert_close(losses[0], losses[1])


class Estimate(nn.Module):
    """x̂_φ = 0.4 x in the form of a prediction type."""

    def __init__(self, kind: str, schedule: LogLinear) -> None:
        super().__init__()
        self.kind, self.schedule = kind, schedule

    def forward(self, x, time):
        level = self.schedule.level((time.double().cpu() + 1) / 1000)
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        if self.kind == "edm":
            x = x * (alpha**2 / 4 + sigma**2).sqrt()  # the input is scaled
        eps = (x - 0.4 * alpha * x) / sigma
        level = replace(level, alpha=alpha, sigma=sigma)
        return target(self.kind, 0.4 * x, eps, level, 0.5)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_loss_on_v_is_that_of_the_source(share):
    """½ (-dλ/dt) α² |v - v̂ + σ (x̂ - x_φ + y - dy/dλ)|², y = x_0 c + h, for c = 0."""
    torch.manual_seed(1)
    parts = [Perceptron([2], 8), Perceptron([2], 8)]
    for part in parts:
        nn.init.normal_(part.last.weight, std=0.3)
    network = MeanEncoderNetwork(lambda: parts[0], lambda: parts[1], share).double()
    process = Process(LogLinear(-5.0, 7.0), shape=(2,), estimate="encoded_mean")
    denoiser = Denoiser(network, process)
    draw = BOUND.draw(process, SampleKey(0, 0, torch.arange(6), 6))
    x0, eps = torch.randn(2, 6, 2, dtype=torch.float64)
    level = draw.level
    with torch.no_grad():
        found = BOUND(denoiser, x0, None, draw._replace(noise=eps))
        logsnr = level.logsnr

        def inner(logsnr):
            return share * x0 + network.residual(x0, (7.0 - logsnr) / 12)

        y, slope = inner(logsnr), (inner(logsnr + 1e-5) - inner(logsnr - 1e-5)) / 2e-5
        mean = level.alpha**2 * x0 + level.sigma**2 * y
        x, v = level.alpha * mean + level.sigma * eps, level.alpha * eps - level.sigma * mean
        v_hat = denoiser.output(x, level)
        x_hat = level.alpha * x - level.sigma * v_hat
        # The source estimates dx_φ/dλ by σ² x̂; here it is k x̂, which is the same for c = 0.
        rate = network.target(x0, level).factor - 1
        error = v - v_hat + (rate * x_hat - level.sigma**2 * (mean - y + slope)) / level.sigma
        expected = (12 * level.alpha**2 * error.square()).mean(1) / 2
        last = network.encode(x0, process.schedule.level(1.0))
    alpha2 = 1 / (1 + math.exp(5.0))
    scale = alpha2 / 4 + 1 - alpha2
    divergence = (1 - alpha2 + alpha2 * last.square()) / scale - 1 - math.log((1 - alpha2) / scale)
    torch.testing.assert_close(found, expected + divergence.mean(1) / 2, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": MSE()}, "encoder of the process is learned, .*set objective.weight to ELBO"),
        ({"corrected": False}, "objective.corrected to true, not ELBO\\(\\) and false"),
        ({"offset": 0.1}, "leave objective.offset at its default"),
    ],
)
def test_an_objective_that_is_not_the_bound_is_refused(changed, message):
    process = helper.denoiser(0.0).process
    BOUND.check(process)
    with pytest.raises(ValueError, match=message):
        replace(BOUND, **changed).check(process)
