"""Reward tuning: the divergences of Gaussians, and the optimum of a linear reward."""

import math
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.distillation import RewardTuning, RunTeacher, Student
from diffcore.distillation.matching.reward import GaussianDivergence, gaussian_divergence
from diffcore.networks import Perceptron
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.samplers import Consistency
from diffcore.schedules import Cosine, Trailing
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import read_reports

PROCESS = Process(Cosine(), shape=(2,), low=-6.0, high=6.0, estimate="consistency")
DIRECTION = torch.tensor([0.6, -0.2])


def linear(x0):
    """The reward c·x_0."""
    return x0 @ DIRECTION


class Shifted(nn.Module):
    """The student x_0 = tanh(x) + shift, as v at pure noise and elsewhere."""

    def __init__(self, shift=(0.0, 0.0)):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x, time):
        level = PROCESS.schedule.level((time.double() + 1) / 1000)
        alpha, sigma = (value.to(x)[:, None] for value in (level.alpha, level.sigma))
        return (alpha * x - (x.tanh() + self.shift)) / sigma


def integrated(delta, name):
    """The divergence of N(0, 1) and N(δ, 1) by the trapezoidal rule."""
    x = np.linspace(-12, 12 + delta, 200_001)
    p, q = stats.norm.pdf(x), stats.norm.pdf(x, delta)
    m = (p + q) / 2

    def kl(a, b):
        return np.trapezoid(a * np.log(a / b), x)

    return {
        "kl": lambda: kl(p, q),
        "jeffreys": lambda: kl(p, q) + kl(q, p),
        "hellinger": lambda: 1 - np.trapezoid(np.sqrt(p * q), x),
        "js": lambda: (kl(p, m) + kl(q, m)) / 2,
    }[name]()


@pytest.mark.parametrize("name", get_args(GaussianDivergence))
def test_the_divergence_is_that_of_two_gaussians(name):
    for delta in (0.0, 0.3, 1.0, 2.5):
        square = torch.tensor(delta**2, dtype=torch.float64, requires_grad=True)
        found = gaussian_divergence(square, name)
        assert float(found.detach()) == pytest.approx(integrated(delta, name), abs=1e-6)
        (gradient,) = torch.autograd.grad(found, square)
        assert gradient.isfinite()
        assert gradient > 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run of the student's process."""
    folder = tmp_path_factory.mktemp("reference")
    options = {
        "network": partial(Perceptron, [2], width=16),
        "data": TensorDataset(torch.randn(64, 2, generator=torch.Generator().manual_seed(0))),
        "process": replace(PROCESS, estimate="posterior_mean"),
        "optimizer": torch.optim.AdamW,
        "steps": 2,
        "batch_size": 8,
        "trackers": [],
        "config": "network:\n"
        "  class_path: diffcore.networks.Perceptron\n"
        "  init_args: {shape: [2], width: 16}\n",
    }
    Trainer(folder=folder, objective=Objective(), **options).train()
    PROCESS.save(folder / "process.json")
    return folder


def objective(folder, steps=1, **options):
    return RewardTuning(
        reference=RunTeacher(str(folder)), reward=linear, student=Student(steps), **options
    )


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["kl", "jeffreys"])
def test_the_gradient_is_zero_at_the_optimum_of_a_linear_reward(reference, name, steps):
    """One step: β δ²/2 - c·x_0 is minimal where the shift is c σ²/(β α²), twice that for δ²/2.

    With more steps the shift of the last one is the same, and the earlier ones have divergences of
    their own: the gradient is then that of finite differences.
    """
    tuned = objective(reference, steps, divergence=name, strength=0.5, end=2.0)
    best = DIRECTION * 4 / 0.5 / (2 if name == "jeffreys" else 1)
    networks = Networks(Denoiser(Shifted(), PROCESS).requires_grad_(False))
    draw = tuned.draw(PROCESS, SampleKey(0, 0, torch.arange(64), 64))

    def loss(shift):
        student = Denoiser(Shifted(shift), PROCESS)
        value = tuned(student, torch.zeros(64, 2), None, draw, networks=networks).mean()
        return value, student.network.shift

    value, shift = loss(tuple(best.tolist()))
    (gradient,) = torch.autograd.grad(value, shift)
    if steps == 1:
        assert gradient.abs().max() < 1e-4
    step = 1e-2
    for axis in range(2):
        ends = [best.clone() for _ in range(2)]
        (ends[0][axis], ends[1][axis]) = (best[axis] - step, best[axis] + step)
        low, high = (float(loss(tuple(end.tolist()))[0].detach()) for end in ends)
        assert float(gradient[axis]) == pytest.approx((high - low) / (2 * step), abs=2e-3)


def test_a_reward_moves_the_student_and_a_strong_divergence_holds_it(reference, tmp_path):
    gains = {}
    for strength in (0.02, 50.0):
        state = Trainer(
            network=partial(Perceptron, [2], width=16),
            data=TensorDataset(torch.zeros(64, 2)),
            process=PROCESS,
            optimizer=torch.optim.AdamW,
            folder=tmp_path / str(strength),
            objective=objective(reference, 2, strength=strength, end=1.0),
            init=str(reference),
            init_weights="raw",
            lr=LearningRate(3e-3, warmup=1),
            steps=30,
            batch_size=32,
            log_every=1,
            trackers=[],
            sampler=Consistency(),
            grid=Trailing(),
        ).train()
        assert not state.further
        losses = [line["loss"] for line in read_reports(tmp_path / str(strength))]
        gains[strength] = sum(losses[:5]) / 5 - sum(losses[-5:]) / 5
    assert gains[0.02] > 0.3
    assert abs(gains[50.0]) < 0.3 * gains[0.02]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0, expected a positive number"),
        ({"divergence": "tv"}, "divergence is 'tv', expected one of kl"),
        ({"end": math.inf}, "end is inf, expected a positive ratio"),
    ],
    ids=repr,
)
def test_values_out_of_range_are_refused(reference, options, message):
    with pytest.raises(ValueError, match=message):
        objective(reference, **options)


def test_another_process_than_that_of_the_reference_is_refused(reference):
    objective(reference).check(PROCESS)
    with pytest.raises(ValueError, match=r"process.high of the student is 5.0, but that of the r"):
        objective(reference).check(replace(PROCESS, high=5.0))


def without_gradient(x0):
    return x0.detach().sum(1)


REWARDS = {
    "another shape": (lambda x0: x0, r"reward of 2 samples has shape \(2, 2\), expected \(2,\)"),
    "a number": (lambda x0: 1.0, r"the reward is a float, expected a tensor"),
    "no gradient": (without_gradient, r"the reward has no gradient.*without detach or no_grad"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_trains_nothing_is_refused_before_the_training(reference, name):
    reward, message = REWARDS[name]
    tuned, student = replace(objective(reference), reward=reward), Denoiser(Shifted(), PROCESS)
    with pytest.raises(ValueError, match=message):
        tuned.networks(student, torch.device("cpu"), lambda network: network)


def test_a_reward_that_is_no_function_is_refused(reference):
    with pytest.raises(ValueError, match=r"reward is 3, expected a function of x_0"):
        replace(objective(reference), reward=3)


def test_a_reward_of_another_shape_is_refused(reference):
    tuned = replace(objective(reference), reward=lambda x0: x0)
    student = Denoiser(Shifted(), PROCESS)
    draw = tuned.draw(PROCESS, SampleKey(0, 0, torch.arange(4), 4))
    with pytest.raises(
        ValueError, match=r"reward of 4 samples has shape \(4, 2\), expected \(4,\)"
    ):
        tuned(student, torch.zeros(4, 2), None, draw, networks=Networks(student))
