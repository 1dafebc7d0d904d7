"""Whether scaling the data by b is a shift of λ by 2 ln b.

    α b x_0 + σ ε = √(α² b² + σ²) (α' x_0 + σ' ε),   λ' = λ + 2 ln b

The identity is checked on trajectories of an exact denoiser, and on the losses of two trainings: on
scaled data with a normalised network input, and on the data with a shifted schedule.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from benchmarks.accuracy import plane
from torch import Tensor, nn

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Shifted, Trailing
from experiments.claims.network import Perceptron, TrainingData, batch_loss, digits_data, train
from experiments.study import continue_study
from experiments.training import digits_process

__all__ = ["SCALES", "NormalizedInput", "measure", "run_study", "trajectory_difference"]

SCALES = (0.3, 0.6, 1.5)
TRAINING_STEPS = 100
"""Optimizer steps; every loss is compared."""


class NormalizedInput(nn.Module):
    """F(x / √(α² b² + σ²), t), the input of unit variance for data b x_0 with unit variance of x_0.

    Args:
        network: F.
        process: process of the scaled data.
        b: scale of the data.
    """

    def __init__(self, network: nn.Module, process: Process, b: float) -> None:
        super().__init__()
        self.network, self.process, self.b = network, process, b

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        level = self.process.time.level(self.process.schedule, time.view(-1, 1, 1, 1))
        alpha, sigma = level.alpha, level.sigma
        scale = ((alpha * self.b) ** 2 + sigma**2) ** -0.5
        output: Tensor = self.network(scale * x, time, class_labels)
        return output


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all scales and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the trajectories.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(b, seed) for seed in seeds for b in SCALES]
    return continue_study(out, ("b", "seed"), cells, lambda b, seed: [measure(b, seed)])


def measure(b: float, seed: int, steps: int = TRAINING_STEPS) -> dict[str, float]:
    """Compare scaled data with a shifted schedule.

    Args:
        b: scale of the data.
        seed: seed of the trainings and of the trajectories.
        steps: optimizer steps.

    Returns:
        trajectories: `trajectory_difference`; losses: greatest relative difference of the losses of
        ten batches after the trainings; plain: the same if the input of the network is not
        normalised.
    """
    scaled = digits_process(Cosine(), "epsilon")
    shifted = digits_process(Shifted.by_input_scale(Cosine(), b), "epsilon")
    expected = _losses(Perceptron, shifted, 1.0, seed, steps)
    normalized = _losses(lambda: NormalizedInput(Perceptron(), scaled, b), scaled, b, seed, steps)
    plain = _losses(Perceptron, scaled, b, seed, steps)
    return {
        "trajectories": trajectory_difference(b, seed),
        "losses": float((normalized / expected - 1).abs().max()),
        "plain": float((plain / expected - 1).abs().max()),
    }


def trajectory_difference(b: float, seed: int, count: int = 100) -> float:
    """Compare DDIM trajectories of scaled Gaussians with those of the shifted schedule.

    Args:
        b: scale of the data.
        seed: seed of the trajectories.
        count: number of trajectories.

    Returns:
        Greatest difference of the ends, x_0 of the scaled data over b and x_0 of the data, over the
        greatest |x_0|.
    """
    data, ends = plane(), []
    for factor, schedule in ((b, Cosine()), (1.0, Shifted.by_input_scale(Cosine(), b))):
        covariances = data.axes @ torch.diag_embed(data.eigenvalues) @ data.axes.mT
        oracle = GaussianMixture(
            factor * data.means,
            factor**2 * covariances,
            data.log_weights.exp(),
            process=Process(schedule, shape=(2,)),
        )
        seeds = range(seed * count, (seed + 1) * count)
        x = sample(oracle, DDIM(), Trailing(), 20, seeds=seeds, dtype=torch.float64).x
        ends.append(x / factor)
    return float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())


def _losses(
    network: Callable[[], nn.Module], process: Process, b: float, seed: int, steps: int
) -> Tensor:
    """(10,) losses after a training on b x_0, in float64."""
    scans = digits_data()
    data = TrainingData(b * scans.x0.double(), scans.labels)
    objective = Objective(MSE("epsilon"))
    trained = train(lambda: network().double(), process, objective, data, seed, [steps])
    denoiser = next(trained)[1]
    with torch.no_grad():
        losses = [batch_loss(denoiser, objective, data, 10**6 + seed, step) for step in range(10)]
    return torch.stack(losses)
