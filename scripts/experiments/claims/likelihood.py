"""Bits per dimension of held-out digits by the dequantisation, for two kinds of training data.

The scans have 17 values. Networks are trained on the scans themselves, and on scans to which
uniform noise of one bin was added, and evaluated with both dequantisations.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffcore.core.denoiser import Denoiser
from diffcore.evaluation.likelihood.bits import bits_per_dimension
from diffcore.evaluation.likelihood.dequantisation import Dequantisation, TruncatedNormal, Uniform
from diffcore.evaluation.likelihood.trace import Hutchinson
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.training.data import Digits
from experiments.claims.arms import ARMS
from experiments.claims.network import Perceptron, TrainingData, digits_data, train
from experiments.study import continue_study

__all__ = ["DEQUANTISATIONS", "load_data", "measure", "run_study"]

TRAINING_STEPS = (1000, 3000)
BINS = 17
COUNT = 100
"""Held-out scans that are measured."""
COPIES = 4
"""Draws of uniform noise for each training scan."""
DEQUANTISATIONS: dict[str, Dequantisation] = {
    "uniform": Uniform(BINS),
    "truncated normal": TruncatedNormal(BINS),
}
TRAINING_DATA = ("quantised", "with uniform noise")


def load_data(name: str) -> TrainingData:
    """The training scans, with or without noise.

    Args:
        name: quantised, or with uniform noise.

    Returns:
        The scans with their labels; with noise, COPIES of each.
    """
    data = digits_data()
    assert data.labels is not None
    if name == "quantised":
        return data
    x0, labels = data.x0.repeat(COPIES, 1, 1, 1), data.labels.repeat(COPIES)
    noisy = Uniform(BINS).draw(ARMS["cosine, v"].process, x0, 0, torch.arange(len(x0))).y
    return TrainingData(noisy.float(), labels)


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all networks and seeds that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings and of the noise.

    Yields:
        The lines that are appended to the file.
    """
    cells = [(data, seed) for data in TRAINING_DATA for seed in seeds]
    return continue_study(out, ("data", "seed"), cells, _measure_cell)


def _measure_cell(name: str, seed: int) -> Iterator[dict[str, Any]]:
    process, objective = ARMS["cosine, v"].process, Objective(MSE("v_prediction"))
    data = load_data(name)
    for steps, denoiser in train(Perceptron, process, objective, data, seed, TRAINING_STEPS):
        for row in measure(denoiser.eval(), seed):
            yield {"steps": steps, **row}


def measure(denoiser: Denoiser, seed: int, count: int = COUNT) -> Iterator[dict[str, Any]]:
    """Measure the bits per dimension of held-out scans under their labels.

    Args:
        denoiser: trained network.
        seed: seed of the noise.
        count: number of scans.

    Yields:
        For each dequantisation: bits, the mean bits per dimension; error, their standard error over
        the scans; and evaluations.
    """
    scans = Digits("test")
    for name, dequantisation in DEQUANTISATIONS.items():
        found = bits_per_dimension(
            denoiser,
            scans.x0[:count],
            dequantisation,
            trace=Hutchinson(),
            condition=scans.labels[:count],
            seed=seed,
            batch_size=count,
        )
        yield {
            "dequantisation": name,
            "bits": found.mean,
            "error": found.standard_error,
            "evaluations": found.evaluations,
        }
