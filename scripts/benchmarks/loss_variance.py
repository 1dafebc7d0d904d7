"""The variance of a batch's loss with independent noise levels over that with stratified levels."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.table import markdown_table
from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE, MinSNR, Weight
from diffcore.schedules import (
    Beta,
    Cauchy,
    Cosine,
    Flow,
    Laplace,
    Level,
    LogLinear,
    Mode,
    Normal,
    PowerCosine,
    Rho,
    Schedule,
    Sigmoid,
    Truncated,
)

SHAPE, BATCH, STD = (1, 8, 8), 64, 0.7
SCHEDULES: tuple[Schedule, ...] = (
    *(Cosine(), Flow(), Laplace(), Normal(), Cauchy(), LogLinear(-8.0, 8.0)),
    *(Rho(), Sigmoid(), Mode(), Beta(), PowerCosine()),
)
WEIGHTS: tuple[Weight, ...] = (MSE("epsilon"), MSE("v_prediction"), MinSNR())


class Posterior(nn.Module):
    """The network E[v | x] for pixels N(0, s²), whose losses vary like those of training.

    Args:
        level: noise level of x.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.level.to(x)
        z = x / (level.alpha**2 * STD**2 + level.sigma**2)
        return target("v_prediction", level.alpha * STD**2 * z, level.sigma * z, level, STD)


def variance_ratio(schedule: Schedule, weight: Weight, steps: int = 100) -> float:
    """Measure the variance of the mean loss of a batch over steps.

    Args:
        schedule: distribution of the levels.
        weight: loss weight.
        steps: number of batches.

    Returns:
        The variance with independent levels over that with stratified levels.
    """
    process = Process(schedule, shape=SHAPE)
    independent, stratified = (
        _losses(process, Objective(weight, levels), steps).var()
        for levels in ("independent", "stratified")
    )
    return float(independent / stratified)


def measure_table(steps: int = 100, schedules: Iterable[Schedule] = SCHEDULES) -> str:
    """Measure all schedules, truncated to |λ| ≤ 8, and weights.

    Args:
        steps: number of batches of each measurement.
        schedules: schedules to measure.

    Returns:
        The table as Markdown.
    """
    header = ["schedule", "ε error", "v error", "Min-SNR"]
    rows = []
    for schedule in schedules:
        truncated = Truncated(schedule, -8.0, 8.0)
        ratios = [variance_ratio(truncated, weight, steps) for weight in WEIGHTS]
        rows.append([str(schedule), *(f"{ratio:.1f}" for ratio in ratios)])
    return markdown_table(header, rows)


def _losses(process: Process, objective: Objective, steps: int) -> Tensor:
    index = torch.arange(BATCH)
    return torch.stack(
        [_loss(process, objective, SampleKey(0, step, index, BATCH)) for step in range(steps)]
    )


def _loss(process: Process, objective: Objective, key: SampleKey) -> Tensor:
    x0 = STD * normal(1, Stream.ORACLE, key.position, process.shape, dtype=torch.float64)
    draw = objective.draw(process, key)
    return objective(Denoiser(Posterior(draw.level), process), x0, None, draw).mean()
