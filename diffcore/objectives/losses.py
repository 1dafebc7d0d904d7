"""What the error of the network's own target costs, element by element. All cost e² where e is
small.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Loss(ABC):
    """ρ(e) of an error e; a loss other than the squared one weighs errors in the network's own
    target.
    """

    @abstractmethod
    def __call__(self, error: Tensor) -> Tensor:
        """ρ(e), elementwise."""


@dataclass(frozen=True)
class SquaredError(Loss):
    """ρ(e) = e²: the network learns the posterior mean."""

    def __call__(self, error: Tensor) -> Tensor:
        return error**2


@dataclass(frozen=True)
class Huber(Loss):
    """ρ(e) = e² for |e| ≤ δ, else δ(2|e| - δ). Huber 1964, times 2.

    Args:
        delta: δ > 0, in units of the target.
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
    """ρ(e) = 2δ²(√(1 + (e/δ)²) - 1), smooth. Charbonnier et al. 1997; for diffusion: Khrapov et al.
    2024 (2403.16728).

    Args:
        delta: δ > 0, in units of the target.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _check(self.delta)

    def __call__(self, error: Tensor) -> Tensor:
        return 2 * error**2 / (1 + (1 + (error / self.delta) ** 2).sqrt())  # without the difference


def _check(delta: float) -> None:
    if not 0 < delta < math.inf:
        raise ValueError(f"delta is {delta}, expected a positive finite error")
