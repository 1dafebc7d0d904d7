"""A denoiser that torch.compile compiles into one graph for all noise levels."""

from typing import Any

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser, DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level
from diffcore.schedules.base import Real

__all__ = ["CompiledDenoiser"]


class CompiledDenoiser(DenoiserWrapper):
    """A denoiser whose network and arithmetic are compiled once, with the level as tensors.

    With the level as Python floats, a compiled denoiser is compiled again when they first change,
    and once more for each value that a branch compares. Here α, σ, λ and t are inputs of the graph:
    there is one graph for each number of rows, so one without and one with references.

    Args:
        denoiser: network with its process.
        backend: backend of torch.compile.

    Example:
        sample(CompiledDenoiser(Run("runs/digits").denoiser()), seeds=range(64))
    """

    def __init__(self, denoiser: Denoiser, backend: Any = "inductor") -> None:
        super().__init__(denoiser)
        self._compiled = torch.compile(
            denoiser.forward, fullgraph=True, dynamic=False, backend=backend
        )

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        result: Prediction = self._compiled(x, _as_map(level, x), condition)
        return result


def _as_map(level: Level, x: Tensor) -> Level:
    """The level as float64 host tensors (B, 1, ..., 1); a map of levels as it is."""
    if isinstance(level.logsnr, Tensor):
        return level
    values = (_rows(value, x) for value in (level.logsnr, level.t, level.alpha, level.sigma))
    end = None if level.end is None else _as_map(level.end, x)
    logsnr, t, alpha, sigma = values
    return Level(logsnr, t, alpha, sigma, level.schedule, end)


def _rows(value: Real, x: Tensor) -> Tensor:
    return torch.full((len(x), *[1] * (x.ndim - 1)), float(value), dtype=torch.float64)
