"""The study of couplings: straightness in closed form, and the variance of gradients."""

import pytest
import torch
from experiments.claims.coupling import (
    COUPLINGS,
    gradient_variance,
    load_data,
    measure,
    measure_paths,
)
from experiments.claims.network import Perceptron, TrainingData, batch_loss

from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import EmpiricalDistribution, GaussianMixture
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.schedules import Flow

PROCESS = Process(Flow(), "flow_prediction", shape=(2,), sigma_data=1.0)


def test_the_flow_to_one_point_is_straight():
    point = torch.tensor([[2.0, 1.0]])
    found = measure_paths(EmpiricalDistribution(point, process=PROCESS), point.repeat(3, 1), 0, 50)
    assert found["curvature"] < 1e-10
    assert found["few"] < 1e-5
    assert found["distance"] < 1e-9


def test_the_curvature_of_a_gaussian_is_that_of_its_closed_form():
    """z(a) = z(1) √((1-a)² s² + a²), whose ends are s and 1."""
    s = 0.5
    oracle = GaussianMixture(torch.zeros(1, 2), s**2 * torch.eye(2)[None], process=PROCESS)
    a = torch.linspace(0, 1, 20001, dtype=torch.float64)
    scale = ((1 - a) ** 2 * s**2 + a**2).sqrt()
    line = 1 - s
    curvature = (scale.diff() * 20000 - line).square().mean() / line**2
    data = s * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    found = measure_paths(oracle, data, 0, 1000)
    assert found["curvature"] == pytest.approx(float(curvature), rel=0.1)  # 100 steps
    end, few = (end_of_euler(s, steps) for steps in (100, 5))
    line_length = found["cost"] ** 0.5 / (1 - end)  # root mean square |z(1)|
    assert found["few"] == pytest.approx((end - few) * line_length, rel=1e-4)
    for name, spread in (("distance", end), ("few_distance", few)):  # of N(0, spread²) to N(0, s²)
        assert found[name] == pytest.approx(2 * (spread - s) ** 2, abs=0.01)
    assert 2 * (few - s) ** 2 > 0.03


def end_of_euler(s, steps):
    """z(0)/z(1) of DDIM: x_0 = z (1-a) s² / ((1-a)² s² + a²) at each of the equal steps."""
    z = 1.0
    for i in range(steps, 0, -1):
        a = i / steps
        x0 = z * (1 - a) * s**2 / ((1 - a) ** 2 * s**2 + a**2)
        z += (x0 - z) / i
    return z


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_gradient_variance_is_that_of_stored_gradients(name):
    data = TrainingData(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)))
    denoiser = _denoiser()
    objective = Objective(MSE("flow_prediction"), coupling=COUPLINGS[name])
    weights = list(denoiser.parameters())
    gradients = []
    for step in range(5):
        parts = torch.autograd.grad(batch_loss(denoiser, objective, data, 10**6, step), weights)
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    expected = torch.stack(gradients).var(0).sum()
    found = gradient_variance(denoiser, objective, data, 0, 5)
    assert found == pytest.approx(float(expected), rel=1e-6)


def _denoiser():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(Perceptron(2, 0, width=8, blocks=1), PROCESS)


def test_a_problem_is_measured_with_all_quantities(monkeypatch):
    monkeypatch.setattr("experiments.claims.coupling.STEPS", 6)
    found = measure(load_data("2-D"), COUPLINGS["independent"], 0, steps=2, count=5, batches=2)
    assert list(found["gradient"]) == ["1", "2"]
    assert load_data("digits").x0.shape == (1500, 1, 8, 8)
