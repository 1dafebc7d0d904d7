"""The loss that trains learned levels, against the bound of normal data in closed form."""

import math
from dataclasses import replace

import pytest
import torch

from diffcore.core.random import normal
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.losses import Huber
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import ELBO, MSE
from tests.helpers import learned_levels as helper

BOUND = Objective(ELBO(), corrected=True)
WIDE = torch.diag(torch.tensor([1.5, 0.05], dtype=torch.float64))
ASSUMED = 0.3 * torch.eye(2, dtype=torch.float64)
CORRELATED = torch.tensor([[1.0, 0.7], [0.7, 0.8]], dtype=torch.float64)


def exact_integral(covariance):
    """½ Σ ln (1 + SNR s²) between the ends, for the variances s² of the principal axes."""
    ends = (helper.SCHEDULE.high, helper.SCHEDULE.low)
    values = [math.exp(end) * torch.linalg.eigvalsh(covariance) for end in ends]
    return float((values[0].log1p() - values[1].log1p()).sum()) / 2


def losses(denoiser, covariance, count, seed=0):
    """The loss of each of `count` samples of normal data."""
    key = SampleKey(seed, 0, torch.arange(count), count)
    draw = BOUND.draw(denoiser.process, key)._replace(
        noise=normal(seed, 1, key.position, denoiser.process.shape, dtype=torch.float64)
    )
    x0 = normal(seed, 2, key.position, (2,), dtype=torch.float64)
    x0 = x0 @ torch.linalg.cholesky(covariance).mT
    return BOUND(denoiser, x0, None, draw), x0


def mean_and_error(values):
    """The mean, and its standard error."""
    found = values.detach()
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("seed", [None, 0, 2])
def test_the_bound_of_an_exact_denoiser_does_not_depend_on_the_levels(seed):
    """It is -E ln p(x_0) for every path between the ends, also where the elements correlate."""
    for covariance in (WIDE, CORRELATED):
        network = helper.denoiser(covariance, seed=seed).network
        found = helper.diffusion_integral(network, covariance, covariance).item()
        assert found == pytest.approx(exact_integral(covariance), rel=1e-5)


def test_the_bound_of_a_denoiser_that_knows_the_mean_level_alone_depends_on_the_levels():
    found = [
        helper.diffusion_integral(
            helper.denoiser(ASSUMED, seed=seed, channels=False).network, ASSUMED, WIDE
        ).item()
        for seed in (None, 0, 2)
    ]
    assert max(found) - min(found) > 1
    assert min(found) > exact_integral(WIDE)


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("channels", [True, False])
def test_the_loss_is_the_integral_in_nats_per_dimension(seed, channels):
    denoiser = helper.denoiser(ASSUMED, seed=seed, channels=channels)
    expected = helper.diffusion_integral(denoiser.network, ASSUMED, WIDE).item() / 2
    found, error = mean_and_error(losses(denoiser, WIDE, 20000)[0])
    assert error < 0.02 * expected
    assert found == pytest.approx(expected, abs=4 * error)


def test_the_gradient_of_the_levels_is_that_of_the_integral():
    denoiser = helper.denoiser(ASSUMED, seed=2, channels=False)
    coefficients = denoiser.network.levels.coefficients
    integral = helper.diffusion_integral(denoiser.network, ASSUMED, WIDE) / 2
    (expected,) = torch.autograd.grad(integral, coefficients)
    parts = []
    for seed in range(8):
        (part,) = torch.autograd.grad(losses(denoiser, WIDE, 5000, seed)[0].mean(), coefficients)
        parts.append(part)
    found, error = torch.stack(parts).mean(0), torch.stack(parts).std(0) / math.sqrt(8)
    assert expected.abs().max() > 20 * error.max()
    assert ((found - expected).abs() < 6 * error + 1e-9).all()


def test_training_the_levels_lowers_the_bound_towards_the_entropy():
    """Of a denoiser that takes both elements for equal: their deviations are 1.2 and 0.2."""
    denoiser = helper.denoiser(ASSUMED, channels=False)
    network = denoiser.network
    before = helper.diffusion_integral(network, ASSUMED, WIDE, 500).item()
    optimizer = torch.optim.Adam(network.levels.parameters(), 0.1)
    for step in range(100):
        optimizer.zero_grad()
        losses(denoiser, WIDE, 256, step)[0].mean().backward()
        optimizer.step()
    after = helper.diffusion_integral(network, ASSUMED, WIDE, 500).item()
    assert before == pytest.approx(6.374, abs=0.01)
    assert after < 4.95
    assert after > exact_integral(WIDE)


def test_the_loss_contains_the_divergence_of_the_latent_for_each_dimension():
    denoiser = helper.denoiser(WIDE, latent=3, seed=0)
    with torch.no_grad():
        for layer in denoiser.network.levels.layers[::2]:
            layer.weight.zero_()  # the levels do not depend on z
            layer.bias.zero_()
    found, x0 = losses(denoiser, WIDE, 64)
    expected = denoiser.network.encode(x0, 0, torch.arange(64)).divergence / 2
    with torch.no_grad():
        for parameter in denoiser.network.encoder.last.parameters():
            parameter.zero_()
    without, _ = losses(denoiser, WIDE, 64)
    torch.testing.assert_close(found - without, expected)
    assert expected.min() > 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": MSE()}, "set objective.weight to ELBO and objective.corrected to true"),
        ({"corrected": False}, "objective.corrected to true, not ELBO\\(\\) and false"),
        ({"loss": Huber()}, "leave objective.loss at its default"),
        ({"offset": 0.1}, "leave objective.offset at its default"),
    ],
)
def test_an_objective_that_is_not_the_bound_is_refused(changed, message):
    process = helper.process(2)
    BOUND.check(process)
    with pytest.raises(ValueError, match=message):
        replace(BOUND, **changed).check(process)
    replace(BOUND, **changed).check(replace(process, levels="shared"))
