"""f-divergences between a teacher p and a student q, as weights of the score difference.

    D_f(p‖q) = E_q[f(r)],   r = p/q
    ∇_θ D_f = E[h(r) (s_q - s_p) ∂x/∂θ],   h(r) = r² f''(r)

h is defined up to a factor, which the normalisation removes: its mean at a noise level is 1.
Source: Xu et al. 2025 (f-distill, 2502.15681, Table 1).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffcore.objectives.networks import RunningStatistics

__all__ = ["Divergence", "DivergenceName", "MeanDivergenceWeight"]

DivergenceName = Literal["rkl", "kl", "js", "softened-rkl", "neyman", "hellinger", "jeffreys"]


@dataclass(frozen=True)
class Divergence:
    """The weight h(r) of an f-divergence, from the logit ln r of a discriminator.

        rkl           1              reverse Kullback-Leibler: no discriminator is needed
        kl            r              forward Kullback-Leibler
        js            1 - 1/(1+r)    Jensen-Shannon
        softened-rkl  1/(1+r)        reverse Kullback-Leibler of p and the mean of p and q
        neyman        1/r            χ² of Neyman
        hellinger     √r             squared Hellinger
        jeffreys      1 + r          sum of both Kullback-Leibler divergences

    A weight that grows with r covers the modes of the teacher; one that falls seeks them.

    Args:
        name: name of the divergence.
        bound: largest r and 1/r; a ratio beyond it counts as the bound. A choice of this library.
        bins: number of intervals of t in which the mean of h is estimated.
        decay: decay of the running means for each step of the run.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """

    name: DivergenceName = "rkl"
    bound: float = 20.0
    bins: int = 10
    decay: float = 0.99

    def __post_init__(self) -> None:
        if self.name not in get_args(DivergenceName):
            raise ValueError(
                f"divergence.name is {self.name!r}, expected one of "
                f"{', '.join(get_args(DivergenceName))}"
            )
        if not 1 < self.bound < math.inf:
            raise ValueError(f"divergence.bound is {self.bound}, expected a number above 1")
        if self.bins < 1:
            raise ValueError(f"divergence.bins is {self.bins}, expected at least 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"divergence.decay is {self.decay}, expected within [0, 1)")

    @property
    def needs_ratio(self) -> bool:
        """Whether h depends on r, which a discriminator estimates."""
        return self.name != "rkl"

    def weight(self, logit: Tensor) -> Tensor:
        """h(r) for ln r = `logit`, of its shape.

        Args:
            logit: ln p/q, any shape.

        Returns:
            The weight, which is finite and positive.
        """
        limit = math.log(self.bound)
        logit = logit.clamp(-limit, limit)
        match self.name:
            case "rkl":
                return torch.ones_like(logit)
            case "kl":
                return logit.exp()
            case "js":
                return logit.sigmoid()
            case "softened-rkl":
                return (-logit).sigmoid()
            case "neyman":
                return (-logit).exp()
            case "hellinger":
                return (logit / 2).exp()
            case "jeffreys":
                return 1 + logit.exp()


class MeanDivergenceWeight(RunningStatistics):
    """Running means of h(r) in intervals of t, by which the weight is divided.

    Before the first samples of an interval its mean is 1.

    Args:
        divergence: divergence whose weights are averaged.
    """

    mean: Tensor
    share: Tensor

    def __init__(self, divergence: Divergence) -> None:
        super().__init__()
        self.divergence = divergence
        self.register_buffer("mean", torch.zeros(divergence.bins, dtype=torch.float64))
        self.register_buffer("share", torch.zeros(divergence.bins, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, logit: Tensor, t: Tensor) -> Tensor:
        """h(r) over its running mean at t, of shape (B,); the weights are recorded.

        Args:
            logit: ln r of shape (B,).
            t: times (B,) within [0, 1], on any device.
        """
        weight = self.divergence.weight(logit.double())
        bins = len(self.mean)
        index = (t.to(weight.device) * bins).long().clamp(0, bins - 1)
        sums = weight.new_zeros(2, bins)
        self.record(sums.index_add(1, index, torch.stack((torch.ones_like(weight), weight))))
        mean = torch.where(self.share > 0, self.mean / self.share.clamp(min=1e-300), 1.0)
        return (weight / mean[index]).to(logit.dtype)

    def update(self, sums: Tensor) -> None:
        """Update the running means: those of intervals without a sample stay as they are.

        Args:
            sums: number (bins,) and sum of weights (bins,) of the samples of a step.
        """
        count, total = sums
        rate = (1 - self.divergence.decay) * (count > 0).double()
        self.share.lerp_(torch.ones_like(self.share), rate)
        self.mean.lerp_(total / count.clamp(min=1), rate)
