"""Couplings: the pairing of noise with data in a batch.

A coupling preserves the distribution of the data and that of the noise, so the trained model is one
of the same data. The pairing determines how straight the paths between them are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Coupling", "IndependentCoupling", "OptimalTransport"]


class Coupling(ABC):
    """A pairing of B samples with B noises."""

    group: int = 1
    """Consecutive samples that are paired together; a micro-batch must be a multiple of it."""

    @abstractmethod
    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        """The noise (B, *shape) of each x_0, a permutation of `noise`.

        Args:
            x0: clean samples (B, *shape).
            noise: independent standard normals (B, *shape).
            condition: int64 class labels (B,); None for no condition.

        Raises:
            ValueError: B is not a multiple of `group`. Choose a group that divides the micro-batch.
        """


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """The pairing of independent draws: the noise stays in its order."""

    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return noise


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The permutation within each group of samples that minimises Σ |x_0 - ε|².

    The assignment is exact, and samples exchange noise only within their class. It is a
    permutation, so every noise is used once, whereas the papers draw pairs from the transport plan.
    Groups are consecutive samples of the global batch, so ranks and accumulation do not change the
    result if each group is on one rank. A group with few samples of each class gains little. Each
    step transfers the cost matrix to the host once.

    Sources: Tong et al. 2024 (2302.00482, section 3.2.3), Pooladian et al. 2023 (2304.14772).

    Args:
        group: number of consecutive samples that are paired together, at least 2.

    Raises:
        ValueError: the group is smaller than 2.
    """

    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group is {self.group}, expected at least 2 samples")

    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        if len(x0) % self.group:
            raise ValueError(
                f"{len(x0)} samples are not a multiple of {self}'s group: choose a group that "
                "divides the micro-batch (batch_size / ranks / accumulation)"
            )
        from scipy.optimize import linear_sum_assignment

        x, z = (value.flatten(1).unflatten(0, (-1, self.group)) for value in (x0, noise))
        # |x - z|² without the squared norms, whose sum is the same for every permutation.
        cost = -(x.float() @ z.float().mT).nan_to_num(0.0, 0.0, 0.0)
        if condition is not None:
            label = condition.unflatten(0, (-1, self.group))
            cost = cost.masked_fill(label[:, :, None] != label[:, None], torch.inf)
        chosen = [linear_sum_assignment(block)[1] for block in cost.cpu().numpy()]
        rows = torch.cat(
            [torch.as_tensor(columns) + i * self.group for i, columns in enumerate(chosen)]
        )
        return noise[rows.to(noise.device)]
