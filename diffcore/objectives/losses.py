"""Losses: functions ρ of the error of the network's target, applied elementwise.

All of them equal e² to leading order at e = 0.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Huber", "Loss", "PseudoHuber", "RootMeanSquareHuber", "SquaredError"]


class Loss(ABC):
    """A function ρ(e) of the error of the network's target.

    Only the squared error gives the same objective for every prediction type.
    """

    @abstractmethod
    def __call__(self, error: Tensor) -> Tensor:
        """ρ(e), elementwise, of the shape of the error."""


@dataclass(frozen=True)
class SquaredError(Loss):
    """ρ(e) = e²: the minimiser is the posterior mean."""

    def __call__(self, error: Tensor) -> Tensor:
        return error**2


@dataclass(frozen=True)
class Huber(Loss):
    """ρ(e) = e² for |e| ≤ δ, else δ(2|e| - δ).

    Source: Huber 1964, multiplied by 2.

    Args:
        delta: threshold δ > 0 between the two branches, in units of the target.

    Raises:
        ValueError: δ is not positive and finite.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _check(self.delta)

    def __call__(self, error: Tensor) -> Tensor:
        return 2 * torch.nn.functional.huber_loss(
            error, torch.zeros_like(error), reduction="none", delta=self.delta
        )


@dataclass(frozen=True)
class PseudoHuber(Loss):
    """ρ(e) = 2δ²(√(1 + (e/δ)²) - 1), a smooth function.

    Sources: Charbonnier et al. 1997; for diffusion Khrapov et al. 2024 (2403.16728).

    Args:
        delta: scale δ > 0 of the error from which ρ is linear, in units of the target.

    Raises:
        ValueError: δ is not positive and finite.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _check(self.delta)

    def __call__(self, error: Tensor) -> Tensor:
        # The difference of the definition would cancel where e is much smaller than δ.
        return 2 * error**2 / (1 + (1 + (error / self.delta) ** 2).sqrt())


@dataclass(frozen=True)
class RootMeanSquareHuber(Loss):
    """√(mean e² + c²) - c of a sample, as the mean of its elements ρ(e) = e²/(√(mean e² + c²) + c).

    It is the pseudo-Huber loss √(|e|² + c² D) - c √D of a whole sample of D elements, divided by
    √D: a large element counts less only if the whole error is large.

    Source: Song & Dhariwal 2023 (2310.14189, eq. 8), with c = 0.00054.

    Args:
        scale: c ≥ 0, the root mean square error from which the loss is linear; 0: it is the norm.

    Raises:
        ValueError: c is negative or not finite.
    """

    scale: float = 0.00054

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}, expected a finite error of at least 0")

    def __call__(self, error: Tensor) -> Tensor:
        square = error**2
        mean = square.mean(tuple(range(1, error.ndim)), keepdim=True)
        tiny = torch.finfo(error.dtype).tiny  # the norm has no gradient at 0
        return square / ((mean + max(self.scale**2, tiny)).sqrt() + self.scale)


def _check(delta: float) -> None:
    """Raise ValueError if δ is not positive and finite."""
    if not 0 < delta < math.inf:
        raise ValueError(f"delta is {delta}, expected a positive finite error")
