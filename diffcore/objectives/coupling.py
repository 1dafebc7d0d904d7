"""Couplings: which noise meets which sample of the data. Both keep their own distribution, so what
is learned is a model of the same data; the pairs decide how straight the paths between them are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Coupling(ABC):
    """A pairing of B samples with B noises."""

    group: int = 1
    """Consecutive samples that are paired together; a micro-batch must be a multiple of it."""

    @abstractmethod
    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        """The noise (B, *shape) that meets each x_0, a permutation of `noise`."""


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Any noise meets any sample."""

    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return noise


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """Within groups of samples, the permutation that minimises Σ |x_0 - ε|²: exact, and within a
    class if there are any.

    Tong et al. 2024 (2302.00482, section 3.2.3), Pooladian et al. 2023 (2304.14772), by assignment,
    not by draws from the plan: every noise is used once. Groups are consecutive places of the
    global batch, so ranks and accumulation change nothing as long as a group is on one rank. Few
    samples of a class in a group gain little. One transfer to the host a step.

    Args:
        group: samples paired together, at least 2.
    """

    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group is {self.group}, expected at least 2 samples to pair")

    def __call__(self, x0: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        if len(x0) % self.group:
            raise ValueError(
                f"{len(x0)} samples are no multiple of {self}'s group: choose a group that divides "
                "the micro-batch "
                f"(batch_size over ranks and accumulation)"
            )
        from scipy.optimize import linear_sum_assignment

        x, z = (value.flatten(1).unflatten(0, (-1, self.group)) for value in (x0, noise))
        cost = -(x.float() @ z.float().mT).nan_to_num(
            0.0, 0.0, 0.0
        )  # |x - z|² less what no permutation changes
        if condition is not None:
            label = condition.unflatten(0, (-1, self.group))
            cost = cost.masked_fill(label[:, :, None] != label[:, None], torch.inf)
        chosen = [linear_sum_assignment(block)[1] for block in cost.cpu().numpy()]
        rows = torch.cat(
            [torch.as_tensor(columns) + i * self.group for i, columns in enumerate(chosen)]
        )
        return noise[rows.to(noise.device)]
