"""The variational bound that trains a learned variance, and the variance that it is minimal at."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process, TimeConditioning
from diffcore.objectives.coupling import OptimalTransport
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.variational import Variational
from diffcore.schedules import Cosine, Discrete, Rescaled

BETAS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
KEY = SampleKey(3, 1, torch.arange(24), 24)


def process(**fields):
    fields = {"schedule": Discrete(BETAS), "shape": (2, 3), "prediction": "epsilon"} | fields
    return Process(**fields, time=TimeConditioning("index", 8), variance="learned")


class Linear(nn.Module):
    """ε̂ = 0.4 x and a raw variance of 0.3 x + 0.2, for x of two channels."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.4))
        self.raw = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, time):
        return torch.cat([self.mean * x, self.raw * x + 0.2], 1)


def data(values=17):
    """Samples (24, 2, 3) of quantised data in [-1, 1]."""
    index = torch.randint(values, (24, 2, 3), generator=torch.Generator().manual_seed(0))
    return index * 2 / (values - 1) - 1


def bound(objective, record, x0, network=None):
    """The part of the loss of each sample that the bound adds, and the draw."""
    denoiser, draw = Denoiser(network or Linear(), record), objective.draw(record, KEY)
    with_bound = objective(denoiser, x0, None, draw)
    # A fixed process has no bound; its network is the mean.
    plain = Objective(weight=objective.weight, levels=objective.levels)
    return with_bound - plain(denoiser, x0, None, draw), draw


def iddpm_term(k, x0, eps, values):
    """The term of entry k of the table in bits per dimension, by the formulas with β and ᾱ."""
    betas = np.array(BETAS)
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    posterior = betas * (1 - before) / (1 - bar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    first = betas * np.sqrt(before) / (1 - bar)
    second = (1 - before) * np.sqrt(1 - betas) / (1 - bar)
    x = np.sqrt(bar[k]) * x0 + np.sqrt(1 - bar[k]) * eps
    estimate = (x - np.sqrt(1 - bar[k]) * 0.4 * x) / np.sqrt(bar[k])
    v = (0.3 * x + 0.2 + 1) / 2
    std = np.exp((v * np.log(betas[k]) + (1 - v) * clipped[k]) / 2)
    mean, true_mean = (first[k] * value + second[k] * x for value in (estimate, x0))
    if k == 0:
        half = 1 / (values - 1)
        upper = np.where(x0 > 1 - half, np.inf, x0 + half)
        lower = np.where(x0 < half - 1, -np.inf, x0 - half)
        inside = stats.norm.cdf(upper, mean, std) - stats.norm.cdf(lower, mean, std)
        return -np.log2(inside).mean()
    variance = np.exp(clipped[k])
    kl = np.log(std) - clipped[k] / 2 + (variance + (mean - true_mean) ** 2) / (2 * std**2) - 0.5
    return kl.mean() / math.log(2)


def test_on_a_table_it_is_the_bound_of_improved_diffusion_by_betas():
    objective = Objective(variational=Variational(0.5, steps=8, values=17))
    x0 = data().double()
    network = Linear().double()
    found, draw = bound(objective, process(), x0, network)
    index = (draw.level.t * 8).round().long().flatten() - 1
    assert sorted(set(index.tolist())) == list(range(8))
    for i, k in enumerate(index.tolist()):
        expected = 0.5 * 8 * iddpm_term(k, x0[i].numpy(), draw.noise[i].double().numpy(), 17)
        assert found[i].item() == pytest.approx(expected, rel=1e-6)


def test_only_the_variance_gets_its_gradient():
    network = Linear()
    objective = Objective(variational=Variational(steps=8, values=17))
    found, _ = bound(objective, process(), data(), network)
    found.sum().backward()
    assert network.mean.grad is None or network.mean.grad.abs() < 1e-6
    assert network.raw.grad.abs() > 1e-4


@pytest.mark.parametrize("variance", [0.09, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_best_v_for_gaussian_data_gives_the_variance_of_x_s_given_x_t(variance, steps):
    """V = β̃ + (α_s (1 - r²))² Var(x_0 | x_t), by Gaussian conditioning, and β at unit variance."""
    schedule, t = Cosine(), 0.62
    level, s = schedule.level(torch.tensor([[t]]).double()), schedule.level(t - 1 / steps)
    alpha, sigma = level.alpha.item(), level.sigma.item()
    # The joint covariance of (x_s, x_t), where x_t = a x_s + noise.
    a = alpha / s.alpha
    var_s = s.alpha**2 * variance + s.sigma**2
    var_t = alpha**2 * variance + sigma**2
    best = var_s - (a * var_s) ** 2 / var_t
    beta = 1 - a**2
    beta_tilde = beta * s.sigma**2 / sigma**2
    v = math.log(best / beta_tilde) / math.log(beta / beta_tilde)
    assert -1e-9 < v < 1 + 1e-9
    # Quantiles of x_0 and ε, whose means, variances and covariance are exact.
    z = torch.from_numpy(stats.norm.ppf((np.arange(40) + 0.5) / 40))
    z = z / z.square().mean().sqrt()
    x0, eps = ((z * math.sqrt(variance)).repeat(40)[:, None], z.repeat_interleave(40)[:, None])
    x = alpha * x0 + sigma * eps
    estimate = alpha * variance / var_t * x
    slopes = []
    for shift in (-0.05, 0.0, 0.05):
        value = torch.tensor(v + shift, dtype=torch.float64, requires_grad=True)
        pair = Prediction(estimate, (x - alpha * estimate) / sigma, value.expand_as(x))
        record = Process(shape=(1,), variance="learned")
        loss = Variational(1.0, steps)(record, pair, Prediction(x0, eps), level).mean()
        slopes.append(torch.autograd.grad(loss, value)[0].item())
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 1e-6 * slopes[2]


@pytest.mark.parametrize("scaling", ["ve", "flow"])
@pytest.mark.parametrize("values", [0, 17])
def test_it_does_not_depend_on_the_scaling(scaling, values):
    levels = torch.tensor([0.05, 0.1, 0.14, 0.3, 0.9]).double().view(-1, 1)
    x0, eps = torch.linspace(-1, 1, 5).double().view(-1, 1), torch.ones(5, 1).double()
    pairs = Prediction(x0 + 0.1, 1.1 * eps, 0.4 * eps), Prediction(x0, eps)
    terms = []
    for schedule in (Cosine(), Rescaled(Cosine(), scaling)):
        record = Process(schedule, shape=(1,), variance="learned")
        terms.append(Variational(1.0, 10, values)(record, *pairs, schedule.level(levels)))
    assert torch.allclose(*terms, rtol=1e-9)


def test_of_continuous_levels_the_last_step_is_from_below_3_halves_of_a_step():
    schedule, record = Cosine(), Process(shape=(1,), variance="learned")
    level = schedule.level(torch.tensor([0.04, 0.06, 0.149, 0.151]).double().view(-1, 1))
    x0 = torch.zeros(4, 1, dtype=torch.float64)
    for change in (0.0, 0.3):
        pair = Prediction(x0 + change, x0, x0 + 0.5)
        terms = Variational(1.0, 10, 0)(record, pair, Prediction(x0, x0), level).flatten()
        assert terms[0] == 0
        # The decoder has the density of N(x̂_0, V), with β = σ² of the vp process.
        last = level.sigma.flatten()[1:3]
        before = schedule.level(level.t.flatten()[1:3] + 0.1)
        lower = last**2 * (1 - (last / before.sigma * before.alpha / level.alpha[1:3, 0]) ** 2)
        std = (lower * last**2) ** 0.25
        density = stats.norm.logpdf(0.0, change, std) / -math.log(2) * 10
        assert np.allclose(terms[1:3].numpy(), density, rtol=1e-9)
        assert terms[3] > 0


def test_a_masked_element_adds_nothing():
    objective = Objective(variational=Variational(steps=8, values=17))
    denoiser, x0 = Denoiser(Linear(), process()), data()
    draw, mask = objective.draw(process(), KEY), torch.ones(24, 2, 3)
    mask[:, :, 1:] = 0
    losses = objective(denoiser, x0, None, draw, None, mask)
    part = Denoiser(Linear(), process(shape=(2, 1)))
    small = draw._replace(noise=draw.noise[:, :, :1])
    expected = objective(part, x0[:, :, :1], None, small)
    assert torch.allclose(losses, expected / 3)


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        (Objective(), process(), "the objective does not train it"),
        (Objective(variational=Variational()), Process(), "that of the process is fixed"),
        (Objective(variational=Variational(steps=5)), process(), "set it to 8"),
        (
            Objective(variational=Variational(steps=8)),
            process(low=-math.inf, high=math.inf),
            "set it to 0 for continuous data",
        ),
        (Objective(variational=Variational(steps=8), offset=0.1), process(), "independent"),
        (Objective(variational=Variational(steps=8), perturbation=0.1), process(), "independent"),
        (
            Objective(variational=Variational(steps=8), coupling=OptimalTransport()),
            process(),
            "independent",
        ),
    ],
)
def test_an_objective_that_does_not_fit_the_variance_is_refused(objective, record, message):
    with pytest.raises(ValueError, match=message):
        objective.check(record)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"steps": 1}, {"values": 1}, {"values": -2}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Variational(**options)
