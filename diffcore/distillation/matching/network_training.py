"""How a network beside the student is trained."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from diffcore.objectives.networks import TrainedNetwork
from diffcore.training.optimization.lr import LearningRate

__all__ = ["NetworkTraining"]


@dataclass(frozen=True)
class NetworkTraining:
    """Optimizer and number of updates of a network that is trained beside the student.

    Args:
        updates: number of updates in each step of the student, at least 1.
        lr: learning rate as a function of the step of the student; None for that of the student.
        betas: decays of AdamW without weight decay, such as (0, 0.99) for a discriminator; None
            for the optimizer of the student.

    Raises:
        ValueError: a number is out of range.
    """

    updates: int = 1
    lr: LearningRate | None = None
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates is {self.updates}, expected at least 1")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
            if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
                raise ValueError(f"betas is {self.betas}, expected two numbers within [0, 1)")

    def network(self, module: nn.Module, has_second_derivatives: bool = False) -> TrainedNetwork:
        """A network that the trainer trains in this way.

        Args:
            module: network with its initial weights.
            has_second_derivatives: see `TrainedNetwork`.

        Returns:
            The network and how it is trained.
        """
        optimizer = None
        if self.betas is not None:
            optimizer = partial(_adamw, betas=self.betas)
        return TrainedNetwork(module, optimizer, self.lr, self.updates, has_second_derivatives)


def _adamw(parameters: object, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.0)  # type: ignore[arg-type]
