"""Whether the process of a trained network is found by its denoising error.

Small networks are trained on the digits, each on another prediction type and schedule. The measure
of `diffcore.evaluation.identification` then ranks all processes on 200 held-out scans.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.table import markdown_table
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.doctor.process import check_process
from diffcore.evaluation.identification import Score, best_scores, process_hypotheses
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.training.data import Digits
from experiments.study import create_trainer, small_unet, train_averaged

BASE = Process(shape=(1, 8, 8), sigma_data=0.75)
TRAINED = (
    "epsilon, linear (DDPM), conditioned on index",
    "epsilon, scaled linear (Stable Diffusion), conditioned on index",
    "epsilon, cosine table (iDDPM), conditioned on index",
    "v_prediction, linear (DDPM), conditioned on index",
    "v_prediction, scaled linear (Stable Diffusion), conditioned on index",
    "v_prediction, scaled linear, zero terminal SNR, conditioned on index",
    "v_prediction, cosine, conditioned on index",
    "v_prediction, cosine, shifted to half the resolution, conditioned on index",
    "sample, linear (DDPM), conditioned on index",
    "sample, cosine, conditioned on index",
    "sample, cosine, shifted to half the resolution, conditioned on index",
    "flow_prediction, flow, conditioned on 1000 t",
    "flow_prediction, flow, conditioned on t",
    "edm, any schedule, conditioned on ln(σ)/4",
)
"""Names of the processes on which networks are trained."""


def train_network(name: str, steps: int) -> nn.Module:
    """Train a small network on a process.

    Args:
        name: name of the process.
        steps: optimizer steps.

    Returns:
        The network with its averaged weights.
    """
    process = process_hypotheses(BASE)[name]
    weight = MSE("v_prediction" if process.prediction == "edm" else process.prediction)
    with TemporaryDirectory() as folder:
        network = partial(small_unet, 8, 1, (24, 56))
        trainer = create_trainer(
            network, _Pictures(), process, Objective(weight), Path(folder), 0, steps
        )
        return train_averaged(trainer).network


def rank_processes(name: str, steps: int, count: int = 200) -> list[Score]:
    """Train a network on a process, and rank all processes by its denoising error.

    Args:
        name: name of the process.
        steps: optimizer steps.
        count: number of held-out scans.

    Returns:
        The scores that `diffcore doctor` ranks, the best first.
    """
    denoiser = Denoiser(train_network(name, steps), process_hypotheses(BASE)[name])
    return check_process(denoiser, Digits("test").x0[:count]).scores


def measure_table(steps: int, names: Sequence[str] = TRAINED, count: int = 200) -> str:
    """Train the networks, and name the processes that are found.

    Args:
        steps: optimizer steps of each network.
        names: names of the processes.
        count: number of held-out scans.

    Returns:
        The table as Markdown.
    """
    rows = []
    for name in names:
        scores = rank_processes(name, steps, count)
        best = best_scores(scores)
        others = [score for score in scores if score not in best]
        rows.append(
            [
                name,
                "yes" if name in {score.name for score in best} else "no",
                "; ".join(score.name for score in best),
                f"{best[0].score:.3f}",
                f"{others[0].score:.3f} ({others[0].name})",
            ]
        )
    return markdown_table(["trained on", "found", "best", "its score", "next score"], rows)


class _Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """The training scans without their labels."""

    def __init__(self) -> None:
        self.x0 = Digits("train").x0

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x0[index]
