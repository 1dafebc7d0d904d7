"""How much the choice of levels lowers the variance of a batch's loss: independent levels over stratified ones, same weight."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Stream, normal
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.objectives.objective import Objective, SampleKey
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
WEIGHTS: Mapping[str, Weight] = {"ε": MSE("epsilon"), "v": MSE("v_prediction"), "Min-SNR": MinSNR()}


class Posterior(nn.Module):
    """The network that outputs E[v | x] for pixels N(0, s²): its losses vary as those of a trained network do."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.level.to(x)
        z = x / (level.alpha**2 * STD**2 + level.sigma**2)
        return target("v_prediction", level.alpha * STD**2 * z, level.sigma * z, level, STD)


def ratio(schedule: Schedule, weight: Weight, steps: int = 100) -> float:
    """Variance of the mean loss of a batch over steps: with independent levels over with stratified ones."""
    process = Process(schedule, shape=SHAPE)
    one, other = (
        _losses(process, Objective(weight, levels), steps).var()
        for levels in ("independent", "stratified")
    )
    return float(one / other)


def rows(steps: int = 100, schedules: Iterable[Schedule] = SCHEDULES) -> Iterator[str]:
    """The table, row by row; every schedule is truncated to |λ| ≤ 8."""
    yield (
        "| schedule | "
        + " | ".join(f"{name} error" if name != "Min-SNR" else name for name in WEIGHTS)
        + " |"
    )
    yield "|---|" + "---|" * len(WEIGHTS)
    for schedule in schedules:
        ratios = [
            ratio(Truncated(schedule, -8.0, 8.0), weight, steps) for weight in WEIGHTS.values()
        ]
        yield f"| {schedule} | " + " | ".join(f"{value:.1f}" for value in ratios) + " |"


def _losses(process: Process, objective: Objective, steps: int) -> Tensor:
    index = torch.arange(BATCH)
    return torch.stack(
        [_loss(process, objective, SampleKey(0, step, index, BATCH)) for step in range(steps)]
    )


def _loss(process: Process, objective: Objective, place: SampleKey) -> Tensor:
    x0 = STD * normal(1, Stream.ORACLE, place.position, process.shape, dtype=torch.float64)
    draw = objective.draw(process, place)
    return objective(Denoiser(Posterior(draw.level), process), x0, None, draw).mean()
