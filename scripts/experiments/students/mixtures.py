"""Mixtures of Gaussians with their exact denoisers, and how networks are trained on them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process, TimeConditioning
from diffcore.core.random import Stream, derive_seed
from diffcore.networks import Perceptron, TwoTimes
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.samplers import DDIM
from diffcore.sampling.generation import DEFAULT_GRID, sample
from diffcore.schedules import Flow

__all__ = [
    "SAMPLES",
    "WIDTH",
    "Problem",
    "create_broad_problem",
    "create_problem",
    "create_process",
    "solve_pairs",
    "train",
    "train_step",
]

SAMPLES, BATCH, WIDTH = 4000, 256, 128


class Problem(NamedTuple):
    """A mixture with its exact samples.

    Args:
        oracle: exact denoiser of the mixture.
        data: samples of training.
        truth: samples that are measured against.
        noise: ε of each sample of training; None: independent ones.
    """

    oracle: GaussianMixture
    data: Tensor
    truth: Tensor
    noise: Tensor | None = None


def create_problem(size: int) -> Problem:
    """Build a mixture of five Gaussians in `size` dimensions, with its samples.

    Returns:
        The problem; means and covariances are a function of the size.
    """
    generator = torch.Generator().manual_seed(size)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    means = torch.randn(5, size, **options)
    means = 1.5 * means / means.square().mean(1, keepdim=True).sqrt()
    factors = torch.randn(5, size, size, **options) / size**0.5
    covariances = 0.05 * factors @ factors.mT + 0.02 * torch.eye(size, dtype=torch.float64)
    return _problem(GaussianMixture(means, covariances, process=create_process(size)))


def create_broad_problem() -> Problem:
    """Build a mixture of two Gaussians in the plane, of standard deviation 0.5 at a distance of 2.

    Returns:
        The problem, whose flow is smoother than that of `create_problem`.
    """
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    covariances = 0.25 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    return _problem(GaussianMixture(means, covariances, process=create_process(2)))


def _problem(oracle: GaussianMixture) -> Problem:
    data, truth = oracle.sample(torch.arange(20_000 + SAMPLES)).float().split((20_000, SAMPLES))
    return Problem(oracle, data, truth)


def create_process(size: int) -> Process:
    """The process of the teacher: the flow, with a time from 0 to 20.

    Returns:
        The process.
    """
    return Process(
        Flow(),
        "flow_prediction",
        TimeConditioning("blend", 20.0),
        shape=(size,),
        low=-math.inf,
        high=math.inf,
        sigma_data=1.0,
    )


def train(
    problem: Problem, process: Process, objective: Objective, seed: int, steps: int, start: Any
) -> Denoiser:
    """Train a perceptron, from the weights of one of one time if given.

    Args:
        problem: the data.
        process: process of the network.
        objective: its loss.
        seed: seed of the weights and of the draws.
        steps: optimizer steps of batch 256.
        start: state of the network of one time; None: random weights.

    Returns:
        The network with averaged weights, in evaluation mode.
    """
    torch.manual_seed(seed)
    inner = Perceptron(process.shape, WIDTH, 4)
    if start is not None:
        inner.load_state_dict(start)
    network = TwoTimes(lambda: inner, scale=10.0) if process.estimate == "mean_velocity" else inner
    denoiser = Denoiser(network, process).train()
    objective.check(process)
    networks = objective.networks(denoiser, torch.device("cpu"), lambda module: module)
    optimizer = create_optimizer(network)
    further = {name: create_optimizer(each.module) for name, each in networks.trained.items()}
    average = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(steps):
        for each in (optimizer, *further.values()):
            rate = min(1, (step + 1) / 100) * (1 - step / steps) ** 0.5
            each.param_groups[0]["lr"] = 2e-3 * rate
        train_further(denoiser, problem, objective, networks, further, seed, step)
        train_step(denoiser, problem, objective, networks, optimizer, seed, step)
        for name, value in network.state_dict().items():
            average[name].lerp_(value, max(0.005, 1 / (step + 1)))
    network.load_state_dict(average)
    return denoiser.eval()


def create_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a network.

    Returns:
        Adam.
    """
    return torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.99))


def train_further(
    denoiser: Denoiser,
    problem: Problem,
    objective: Objective,
    networks: Networks,
    optimizers: Mapping[str, torch.optim.Optimizer],
    seed: int,
    step: int,
) -> None:
    """Update the networks of an objective beside the student, each as often as it says.

    Args:
        denoiser: student.
        problem: the data.
        objective: the losses.
        networks: networks of the objective.
        optimizers: optimizer of each network that is trained, by name.
        seed: seed of the draws.
        step: number of the step.
    """
    for name, optimizer in optimizers.items():
        for update in range(networks.trained[name].updates):
            own = derive_seed(seed, Stream.NETWORK, update)
            x0, draw = draw_batch(denoiser.process, problem, objective, own, step)
            losses = objective.network_losses(name, denoiser, x0, None, draw, networks)
            descend(networks.module(name), losses, optimizer)


def train_step(
    denoiser: Denoiser,
    problem: Problem,
    objective: Objective,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> None:
    """Take one step of training.

    Args:
        denoiser: network that is trained.
        problem: the data.
        objective: the loss.
        networks: networks of the objective.
        optimizer: optimizer of the network.
        seed: seed of the draws.
        step: number of the step.
    """
    x0, draw = draw_batch(denoiser.process, problem, objective, seed, step)
    descend(denoiser, objective(denoiser, x0, None, draw, networks=networks), optimizer)


def draw_batch(
    process: Process, problem: Problem, objective: Objective, seed: int, step: int
) -> tuple[Tensor, Draw]:
    """The samples of a step and their random numbers.

    Returns:
        x_0 (B, size) and the draw.
    """
    rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(problem.data)
    draw = objective.draw(process, SampleKey(seed, step, torch.arange(BATCH), BATCH))
    noise = None if problem.noise is None else problem.noise[rows]
    return problem.data[rows], draw.paired(noise)


def descend(network: nn.Module, losses: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step of an optimizer along a clipped gradient.

    Args:
        network: network that is trained.
        losses: (B,) losses.
        optimizer: its optimizer.
    """
    optimizer.zero_grad()
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def solve_pairs(denoiser: Denoiser, problem: Problem) -> Problem:
    """The problem whose data are the ends of a denoiser's flow, each with the ε that it comes from.

    Args:
        denoiser: teacher, whose flow is solved in 25 steps of DDIM.
        problem: problem of the teacher.

    Returns:
        The problem of Reflow.
    """
    seeds = torch.arange(len(problem.data))
    ends = sample(denoiser, DDIM(), DEFAULT_GRID, 25, seeds=seeds, batch_size=SAMPLES).x
    return problem._replace(data=ends, noise=Noise(seeds, denoiser.process.shape).start())
