"""Whether optimal transport within the batch straightens flows and lowers the gradient variance.

Flows are trained on points of a mixture of three Gaussians in two dimensions, on the digits in 64,
and on images of CIFAR-10 of 16x16 pixels in 768, without labels, with independent pairs and with
optimal-transport pairs of noise and data.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.accuracy import plane
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.objectives.coupling import Coupling, IndependentCoupling, OptimalTransport
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM, State
from diffcore.sampling.generation import sample
from diffcore.schedules import Flow, UniformBlend
from diffcore.training.data import ImageFolder
from experiments.claims.network import (
    BATCH,
    Perceptron,
    TrainingData,
    batch_loss,
    digits_data,
    train,
)
from experiments.study import continue_study, sample_seeds

__all__ = ["COUPLINGS", "PROBLEMS", "measure", "run_study"]

COUPLINGS: dict[str, Coupling] = {
    "independent": IndependentCoupling(),
    "optimal transport": OptimalTransport(BATCH),
}
PROBLEMS = ("2-D", "digits", "CIFAR-10")
TRAINING_STEPS = 500
STEPS = 100
"""Steps of the trajectories whose curvature is measured."""
FEW = 5
COUNT = 500
IMAGES = Path("cifar10/test")
"""Folder of the images of CIFAR-10, in one sub-folder for each class."""
EVERY = 4
"""One of so many images is used."""
BATCHES = 50
"""Batches over which the variance of the gradient is estimated."""


@lru_cache(maxsize=1)
def load_data(problem: str) -> TrainingData:
    """The training data of a problem.

    Args:
        problem: 2-D, digits or CIFAR-10.

    Returns:
        5000 points of the mixture, the training scans, or every fourth image, without labels.
    """
    if problem == "2-D":
        return TrainingData(plane().sample(torch.arange(5000)).float())
    if problem == "digits":
        return TrainingData(digits_data().x0)
    images = ImageFolder(str(IMAGES), 16)
    rows = range(0, len(images), EVERY)
    return TrainingData(torch.stack([images[row][0] for row in rows]))


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all problems, couplings and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the samples.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(problem, name, seed) for seed in seeds for problem in PROBLEMS for name in COUPLINGS]
    return continue_study(out, ("problem", "coupling", "seed"), cells, _measure_cell)


def _measure_cell(problem: str, name: str, seed: int) -> list[dict[str, Any]]:
    return [measure(load_data(problem), COUPLINGS[name], seed)]


def measure(
    data: TrainingData,
    coupling: Coupling,
    seed: int,
    steps: int = TRAINING_STEPS,
    count: int = COUNT,
    batches: int = BATCHES,
) -> dict[str, Any]:
    """Train a flow and measure it.

    Args:
        data: training data.
        coupling: pairing of noise and data.
        seed: seed of the training and of the samples.
        steps: optimizer steps.
        count: number of samples.
        batches: number of batches for the variance of the gradient.

    Returns:
        gradient: variance of the gradient of a batch after one optimizer step, and after the last;
        and the measurements of `measure_paths`.
    """
    shape = tuple(data.x0.shape[1:])
    process = Process(Flow(), "flow_prediction", shape=shape, sigma_data=1.0)
    objective = Objective(MSE("flow_prediction"), coupling=coupling)
    network = partial(Perceptron, data.x0[0].numel(), 0)
    variances = {}
    for step, denoiser in train(network, process, objective, data, seed, (1, steps)):
        denoiser.requires_grad_(True)
        variances[str(step)] = gradient_variance(denoiser, objective, data, seed, batches)
    return {"gradient": variances, **measure_paths(denoiser.eval(), data.x0, seed, count)}


def gradient_variance(
    denoiser: Denoiser, objective: Objective, data: TrainingData, seed: int, batches: int
) -> float:
    """The trace of the covariance of a batch's gradient at fixed weights.

    Args:
        denoiser: network.
        objective: loss, with its coupling.
        data: training data.
        seed: seed of the training; the batches are others than those of the training.
        batches: number of batches.

    Returns:
        The sum over weights of the unbiased variance.
    """
    weights = [value for value in denoiser.parameters() if value.requires_grad]
    total = [torch.zeros_like(value, dtype=torch.float64) for value in weights]
    squares = 0.0
    for step in range(batches):
        loss = batch_loss(denoiser, objective, data, 10**6 + seed, step)
        for mean, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
            mean += part / batches
            squares += float(part.double().square().sum())
    square_of_mean = sum(float(mean.square().sum()) for mean in total)
    return (squares - batches * square_of_mean) / (batches - 1)


def measure_paths(denoiser: Denoiser, x0: Tensor, seed: int, count: int) -> dict[str, float]:
    """Measure how straight the trajectories of a flow are.

    Args:
        denoiser: trained flow.
        x0: clean data (N, *shape).
        seed: seed of the samples.
        count: number of samples.

    Returns:
        curvature: mean of |v - V|² over the trajectory over the mean of |V|², where v is the
        velocity and V that of the straight line between its ends, 0 for straight lines; cost: the
        mean of |V|²; few: root mean square distance between the ends of few and of many steps; and
        distance and few_distance, the Fréchet distances of both ends to the data.
    """
    positions: list[Tensor] = []

    def remember(step: int, state: State, prediction: Prediction) -> None:
        positions.append(state.x)

    draw = partial(
        sample, denoiser, DDIM(), UniformBlend(), seeds=sample_seeds(seed, count), batch_size=count
    )
    end, few = draw(STEPS, callback=remember).x, draw(FEW).x
    path = torch.stack([*positions, end]).flatten(2)
    velocity, line = STEPS * path.diff(dim=0), path[-1] - path[0]
    cost = line.square().sum(1).mean()
    return {
        "curvature": float((velocity - line).square().sum(2).mean() / cost),
        "cost": float(cost),
        "few": float((few - end).flatten(1).square().sum(1).mean().sqrt()),
        "distance": frechet_distance(end, x0),
        "few_distance": frechet_distance(few, x0),
    }
