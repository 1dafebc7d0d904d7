"""The density of a flow is that of exact denoisers in closed form."""

import math

import pytest
import torch

from diffcore.core.denoiser import Denoiser, DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.evaluation.likelihood.density import LAST_LOGSNR, first_level, flow_log_density
from diffcore.evaluation.likelihood.trace import ExactTrace, Hutchinson
from diffcore.samplers import DDIM, AdamsMoulton, AdaptiveRungeKutta, Heun
from diffcore.schedules import Cosine, Discrete, Flow, Truncated
from tests.helpers import oracles
from tests.helpers.products import thinned
from tests.helpers.schedules import SCHEDULES

BITS = 2 * math.log(2)
"""Nats of one bit per dimension of data of two elements."""
SOLVER = AdaptiveRungeKutta(rtol=1e-4, atol=1e-4)


def closed_form(oracle, y, condition=None):
    """ln p of y = x/α at the first level of the flow."""
    level = first_level(oracle.process)
    size = y[0].numel()
    return oracle.log_density(level.alpha * y, level, condition) + size * math.log(level.alpha)


def end_correction(oracle, latent, condition=None):
    """ln of the exact density at the end of the flow over that of the noise of `sample`."""
    schedule = oracle.process.schedule
    end = schedule.at(max(LAST_LOGSNR, schedule.logsnr(1.0)))
    std = math.hypot(end.alpha * oracle.process.sigma_data, end.sigma)
    noise = torch.distributions.Normal(0, std).log_prob(latent).flatten(1).sum(1)
    return oracle.log_density(latent, end, condition) - noise


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_density_of_a_mixture_is_that_of_the_closed_form_for_every_schedule(schedule):
    """But for the end of the flow, where `sample` starts from noise instead of exact samples."""
    oracle = oracles.mixture(oracles.process(schedule))
    y = oracle.sample(torch.arange(4))
    found = flow_log_density(oracle, y, solver=SOLVER)
    exact = found.log_density + end_correction(oracle, found.latent)
    assert (exact - closed_form(oracle, y)).abs().max() < 1e-3 * BITS


@pytest.mark.parametrize("schedule", thinned([[each] for each in SCHEDULES], 8))
def test_the_density_of_a_gaussian_is_that_of_the_closed_form_for_every_schedule(schedule):
    """Of the standard deviation of the data, so that `sample` starts from the exact density."""
    record = oracles.process(schedule)
    oracle = oracles.gaussian([0.0, 0.0], record.sigma_data**2 * torch.eye(2), record)
    y = oracle.sample(torch.arange(4))
    found = flow_log_density(oracle, y, solver=SOLVER)
    assert (found.log_density - closed_form(oracle, y)).abs().max() < 1e-3 * BITS


@pytest.mark.parametrize("scaling", oracles.SCALINGS)
@pytest.mark.parametrize("prediction", oracles.PREDICTION_TYPES)
def test_a_network_of_every_prediction_type_and_scaling_has_the_density_of_its_oracle(
    prediction, scaling
):
    record = oracles.process(Cosine(scaling=scaling), prediction=prediction)
    oracle = oracles.mixture(record)
    denoiser = Denoiser(oracles.ExactNetwork(oracle, record), record)
    y = oracle.sample(torch.arange(3)).float()
    found = flow_log_density(denoiser, y, solver=SOLVER)
    assert (found.log_density - closed_form(oracle, y.double())).abs().max() < 1e-3 * BITS


def test_the_density_given_a_class_is_that_of_its_components():
    oracle = oracles.mixture()
    y, labels = oracle.sample(torch.arange(4)), torch.tensor([0, 1, 2, 1])  # 2 is no condition
    found = flow_log_density(oracle, y, solver=SOLVER, condition=labels)
    assert (found.log_density - closed_form(oracle, y, labels)).abs().max() < 1e-3 * BITS


def test_the_first_level_is_that_of_training_if_it_is_noisier():
    record = oracles.process(Discrete())
    assert first_level(record).logsnr == record.schedule.cleanest.logsnr
    assert first_level(oracles.process()).ratio == pytest.approx(1e-3)


def test_the_density_at_a_noisier_level_is_that_of_noisy_data():
    oracle = oracles.mixture()
    level = oracle.process.schedule.at(1.0)
    y = oracle.sample(torch.arange(3))
    found = flow_log_density(oracle, y, level, solver=SOLVER)
    exact = oracle.log_density(level.alpha * y, level) + 2 * math.log(level.alpha)
    assert torch.allclose(found.log_density, exact, atol=1e-3)


@pytest.mark.parametrize(("solver", "order"), [(Heun(), 2), (AdamsMoulton(3), 3)])
def test_a_sampler_of_fixed_steps_converges_to_the_density_with_its_order(solver, order):
    record = oracles.process(Truncated(Flow(), -4.0, 2.0))
    oracle = oracles.mixture(record)
    y = oracle.sample(torch.arange(4))
    exact = flow_log_density(oracle, y, solver=AdaptiveRungeKutta(rtol=1e-7, atol=1e-7))
    errors = [
        (flow_log_density(oracle, y, solver=solver, steps=steps).log_density - exact.log_density)
        .abs()
        .mean()
        for steps in (16, 32)
    ]
    assert errors[1] < errors[0] / 2 ** (order - 0.5)


def test_the_end_of_the_flow_of_data_is_the_noise_that_the_flow_ends_at():
    oracle = oracles.mixture()
    y = oracle.sample(torch.arange(3))
    schedule = oracle.process.schedule
    start, end = first_level(oracle.process), schedule.at(LAST_LOGSNR)
    found = flow_log_density(oracle, y)
    expected = oracles.flow(oracle, start.alpha * y, start, end)
    assert torch.allclose(found.latent, expected, atol=1e-4)


def test_the_number_of_evaluations_is_that_of_the_network():
    record = oracles.process(Flow())
    network = oracles.ExactNetwork(oracles.mixture(record), record)
    y = oracles.mixture().sample(torch.arange(3))
    found = flow_log_density(Denoiser(network, record), y, solver=DDIM(), steps=5, batch_size=2)
    assert len(network.calls) == 2 * found.evaluations == 10
    assert {len(x) for x, _, _ in network.calls} == {2}  # the last chunk is filled up


def test_a_solver_that_adds_noise_is_refused():
    y = oracles.mixture().sample(torch.arange(2))
    for solver in (DDIM(1.0), Heun(churn=5.0)):
        with pytest.raises(ValueError, match=r"needs a deterministic solver|noise"):
            flow_log_density(oracles.mixture(), y, solver=solver, steps=4)


def test_data_of_another_shape_are_refused():
    for y in (torch.zeros(2, 3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"expected at least one sample of .* shape \(2,\)"):
            flow_log_density(oracles.mixture(), y)


class Detached(DenoiserWrapper):
    def __call__(self, x, level, condition=None):
        prediction = self.inner(x, level, condition)
        return Prediction(prediction.x0.detach(), prediction.eps.detach())


def test_a_prediction_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="the prediction has no gradient"):
        flow_log_density(Detached(oracles.mixture()), torch.zeros(2, 2))


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(2)])
def test_the_density_of_a_sample_does_not_depend_on_its_batch(trace):
    y = oracles.mixture().sample(torch.arange(4))
    whole = flow_log_density(oracles.mixture(), y, trace=trace).log_density
    apart = flow_log_density(oracles.mixture(), y, trace=trace, batch_size=1).log_density
    assert torch.allclose(whole, apart, atol=1e-4)


def test_the_density_is_equal_in_two_calls_to_the_last_digit():
    y = oracles.mixture().sample(torch.arange(3))
    values = [
        flow_log_density(oracles.mixture(), y, trace=Hutchinson(), seed=seed).log_density
        for seed in (1, 1, 2)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
