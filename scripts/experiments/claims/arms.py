"""Small networks for the digits by schedule, prediction type, loss weight and time conditioning.

After 250, 500 and 1000 steps the averaged network draws 500 digits; measured are their Fréchet
distances to the training scans and to the held-out scans. Some arms have further measurements after
the last step: samplers at equal numbers of evaluations, and exposure bias.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import Prediction, PredictionType
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.evaluation.digits import to_scan_units
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE, P2, DebiasedWeight, MinSNR
from diffcore.samplers import DDIM, AlphaBlending, GradientEstimation, Sampler, State
from diffcore.sampling.generation import sample
from diffcore.schedules import Cosine, Discrete, Flow, Laplace, Schedule, Trailing
from diffcore.training.data import Digits
from experiments.claims.network import Perceptron, digits_data, train
from experiments.study import continue_study, sample_seeds
from experiments.training import KNOTS, digits_process, measure_distances

__all__ = [
    "ARMS",
    "SAMPLERS",
    "Arm",
    "measure",
    "measure_exposure",
    "measure_samplers",
    "run_study",
]

POINTS = (250, 500, 1000)
LONG = (*POINTS, 2000, 4000)
"""Numbers of optimizer steps after which samples are drawn."""
PER_LABEL = 50
"""Samples of each digit."""
EVALUATIONS = (5, 10, 20, 50)
SAMPLERS: dict[str, tuple[Sampler, int]] = {
    "DDIM": (DDIM(), 1),
    "GradientEstimation": (GradientEstimation(), 1),
    "AlphaBlending(2)": (AlphaBlending(2), 2),
}
"""Sampler and its evaluations in each step. AlphaBlending(1) takes the steps of DDIM."""
STOCHASTIC = {"DDIM": DDIM(), "DDPM": DDIM(1.0)}
"""Samplers whose exposure bias is measured."""


@dataclass(frozen=True)
class Arm:
    """One of the compared trainings.

    Args:
        schedule: distribution of the training noise levels.
        prediction: output of the network.
        objective: loss and its weight; None for plain squared error of the output.
        uses_time: False for a network without time input.
        extras: names of further measurements after the last step: samplers, exposure.
        points: numbers of optimizer steps after which samples are drawn.
    """

    schedule: Schedule
    prediction: PredictionType
    objective: Objective | None = None
    uses_time: bool = True
    extras: tuple[str, ...] = ()
    points: tuple[int, ...] = POINTS

    @property
    def process(self) -> Process:
        """The process of the network."""
        return digits_process(self.schedule, self.prediction)


ARMS = {
    "cosine, ε": Arm(Cosine(), "epsilon"),
    "Laplace, ε": Arm(Laplace(), "epsilon"),
    "cosine, v": Arm(Cosine(), "v_prediction", extras=("samplers",)),
    "Laplace, v": Arm(Laplace(), "v_prediction"),
    "cosine, x_0": Arm(Cosine(), "sample"),
    "Laplace, x_0": Arm(Laplace(), "sample"),
    "linear, ε": Arm(Discrete(), "epsilon", extras=("samplers", "exposure"), points=LONG),
    "Flow, flow": Arm(Flow(), "flow_prediction", extras=("samplers",), points=LONG),
    "cosine, ε, no time": Arm(Cosine(), "epsilon", uses_time=False),
    "cosine, v, no time": Arm(Cosine(), "v_prediction", uses_time=False),
    "Flow, flow, no time": Arm(Flow(), "flow_prediction", uses_time=False),
    "cosine, x_0, Min-SNR": Arm(Cosine(), "sample", Objective(MinSNR())),
    "linear, ε, DDPM-IP": Arm(
        Discrete(),
        "epsilon",
        Objective(MSE("epsilon"), perturbation=0.1),
        extras=("exposure",),
        points=LONG,
    ),
    "linear, ε, Min-SNR": Arm(Discrete(), "epsilon", Objective(MinSNR()), points=LONG),
    "linear, ε, P2": Arm(Discrete(), "epsilon", Objective(P2()), points=LONG),
    "linear, ε, Debiased": Arm(Discrete(), "epsilon", Objective(DebiasedWeight()), points=LONG),
}


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all arms and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the samples.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(name, seed) for seed in seeds for name in ARMS]
    return continue_study(
        out, ("arm", "seed"), cells, lambda name, seed: [measure(ARMS[name], seed)]
    )


def measure(arm: Arm, seed: int, per_label: int = PER_LABEL) -> dict[str, Any]:
    """Train a network and measure its samples.

    Args:
        arm: the training.
        seed: seed of the training and of the samples.
        per_label: samples of each digit.

    Returns:
        distances: to the training and the held-out scans, by the number of steps; and the further
        measurements of the arm under their names.
    """
    found: dict[str, Any] = {"distances": {}}
    objective = arm.objective or Objective(MSE(arm.prediction))
    network = partial(Perceptron, uses_time=arm.uses_time)
    data = digits_data()
    for steps, denoiser in train(network, arm.process, objective, data, seed, arm.points):
        denoiser.eval()
        found["distances"][str(steps)] = measure_distances(denoiser, seed, per_label)
    return found | {name: EXTRAS[name](denoiser, seed, per_label) for name in arm.extras}


def measure_samplers(
    denoiser: Denoiser, seed: int, per_label: int, evaluations: Iterable[int] = EVALUATIONS
) -> dict[str, dict[str, float]]:
    """Measure samplers at equal numbers of evaluations on the knots `Trailing`.

    Args:
        denoiser: trained network.
        seed: seed of the samples.
        per_label: samples of each digit.
        evaluations: numbers of evaluations.

    Returns:
        Fréchet distance to the training scans by the sampler and the number of evaluations.
    """
    labels = torch.arange(10).repeat_interleave(per_label)
    draw = partial(
        sample,
        denoiser,
        seeds=sample_seeds(seed, len(labels)),
        condition=labels,
        batch_size=len(labels),
    )
    real = to_scan_units(Digits("train").x0)
    found: dict[str, dict[str, float]] = {}
    for name, (sampler, cost) in SAMPLERS.items():
        samples = {count: draw(sampler, Trailing(), count // cost).x for count in evaluations}
        found[name] = {
            str(count): frechet_distance(to_scan_units(x), real) for count, x in samples.items()
        }
    return found


def measure_exposure(denoiser: Denoiser, seed: int, per_label: int) -> dict[str, Any]:
    """Measure exposure bias: how inputs in sampling differ from inputs in training.

    At each knot, x of a sampled trajectory is compared with α x_0 + σ ε of training scans that have
    the labels of the samples.

    Args:
        denoiser: trained network.
        seed: seed of the samples.
        per_label: a tenth of the number of samples.

    Returns:
        By the sampler, for each knot: norm, the ratio of the mean squares of the predicted ε, and
        variance, that of the mean squares of x.
    """
    data, index = digits_data(), torch.arange(10 * per_label)
    rows = (uniform(seed, Stream.EVALUATION, index)[:, 0] * len(data.x0)).long()
    assert data.labels is not None
    x0, labels = data.x0[rows], data.labels[rows]
    found: dict[str, Any] = {}
    for name, sampler in STOCHASTIC.items():
        norms: list[float] = []
        variances: list[float] = []

        def compare(
            step: int,
            state: State,
            prediction: Prediction,
            norms: list[float] = norms,
            variances: list[float] = variances,
        ) -> None:
            position = (step + 1) * len(index) + index
            noise = normal(seed, Stream.EVALUATION, position, tuple(x0.shape[1:]))
            x = state.level.alpha * x0 + state.level.sigma * noise
            norms.append(_ratio(prediction.eps, denoiser(x, state.level, labels).eps))
            variances.append(_ratio(state.x, x))

        seeds = sample_seeds(seed, len(rows))
        draw = partial(sample, denoiser, seeds=seeds, condition=labels, batch_size=len(rows))
        draw(sampler, KNOTS, 20, callback=compare)
        found[name] = {"norm": norms, "variance": variances}
    return found


def _ratio(a: Tensor, b: Tensor) -> float:
    """The ratio of the mean squares."""
    return float(a.square().mean() / b.square().mean())


EXTRAS: dict[str, Callable[[Denoiser, int, int], dict[str, Any]]] = {
    "samplers": measure_samplers,
    "exposure": measure_exposure,
}
