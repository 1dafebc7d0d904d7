"""The exact denoiser in the conventions of other libraries, which tests do not install."""

import math
from itertools import pairwise

import pytest
import torch
from benchmarks.accuracy import Problem
from benchmarks.sides import peers

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process

PROBLEM = Problem(
    GaussianMixture(
        torch.tensor([[0.4, -0.3]], dtype=torch.float64),
        torch.diag(torch.tensor([0.36, 0.04], dtype=torch.float64))[None],
        process=Process(shape=(2,)),
    ),
    8,
)


def euler(model, x, sigmas, disable):
    """k-diffusion's sampler of dx/dσ = (x - x_0)/σ."""
    for here, there in pairwise(sigmas):
        x = x + (there - here) * (x - model(x, here.expand(len(x)))) / here
    return x


def spacing(steps, low, high):
    levels = torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    return torch.cat((levels, torch.zeros(1, dtype=torch.float64)))


def schedule(t):
    """σ + α = 1.001, which does not vanish at either end."""
    return 1 - 0.999 * t, 0.001 + 0.999 * t


class Straight:
    """azula's sampler: x_0 and ε of one time, in the scaling of its schedule, at the next."""

    def __init__(self, denoiser, steps, silent, dtype):
        self.denoiser, self.times = denoiser, torch.linspace(1, 0, steps + 1, dtype=dtype)

    def __call__(self, x):
        for here, there in pairwise(self.times):
            (alpha, sigma), (new_alpha, new_sigma) = schedule(here), schedule(there)
            x0 = self.denoiser(x, here).mean
            x = new_alpha * x0 + new_sigma * (x - alpha * x0) / sigma
        return x


@pytest.mark.parametrize(
    "run",
    [
        lambda count: peers._run_k_diffusion(euler, 1, spacing, PROBLEM, count),
        lambda count: peers._run_azula(Straight, 1, schedule, PROBLEM, count),
    ],
    ids=["k-diffusion", "azula"],
)
def test_a_peer_comes_closer_to_the_exact_flow_at_first_order(run):
    errors = []
    for count in (50, 100):
        x, evaluations = run(count)
        assert evaluations == count
        errors.append(PROBLEM.measure_error(x).median)
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)


def test_a_method_of_two_stages_takes_half_as_many_steps():
    taken = []
    peers._run_k_diffusion(
        lambda model, x, sigmas, disable: taken.append(len(sigmas) - 1) or x,
        2,
        spacing,
        PROBLEM,
        7,
    )
    assert taken == [4]  # the last step of 4 has one stage
    assert peers._run_azula(Straight, 2, schedule, PROBLEM, 2) is None
