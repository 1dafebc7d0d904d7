"""The trace of a Jacobian J = ∂v/∂x from its products with vectors.

    exact        tr J = Σ_i e_i·J e_i                the D unit vectors
    Hutchinson   tr J = E[z·J z],  z_i = ±1          some random vectors

Each product is one backward pass through the network.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.random import Stream, uniform

__all__ = ["EXACT_DIMENSIONS", "ExactTrace", "Hutchinson", "Trace", "default_trace"]

EXACT_DIMENSIONS = 64
"""Largest number of elements of x for which the exact trace is the default."""


class Trace(ABC):
    """An estimate of tr ∂v/∂x as the weighted sum of z·J z over some vectors z.

    A subclass implements `vectors`.
    """

    @property
    @abstractmethod
    def weight(self) -> float:
        """The factor of each product z·J z."""

    @abstractmethod
    def vectors(self, size: int, seed: int, position: Tensor) -> Tensor:
        """The vectors z.

        Args:
            size: number D of elements of x.
            seed: 64-bit seed.
            position: (B,) position of each sample, the key of its random vectors.

        Returns:
            (P, B, D) or (P, 1, D) vectors on the host, float64.
        """

    def estimate(self, v: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """The trace of ∂v/∂x for each sample.

        Args:
            v: (B, *shape) function of x, with its graph.
            x: (B, *shape) points, which require a gradient.
            vectors: result of `vectors`, on the device of x.

        Returns:
            (B,) traces.

        Raises:
            ValueError: v has no gradient. Evaluate the network with gradients enabled.
        """
        if not v.requires_grad:
            raise ValueError(
                "the prediction has no gradient, which the divergence of the flow needs: evaluate "
                "the network without torch.no_grad() and torch.inference_mode()"
            )
        total, last = x.new_zeros(len(x)), len(vectors) - 1
        for index, z in enumerate(vectors):
            direction = z.expand(len(x), -1).view_as(x)
            (product,) = torch.autograd.grad(v, x, direction, retain_graph=index < last)
            total += (product * direction).flatten(1).sum(1)
        return self.weight * total


@dataclass(frozen=True)
class ExactTrace(Trace):
    """The exact trace. An evaluation takes D backward passes for x of D elements."""

    @property
    def weight(self) -> float:
        return 1.0

    def vectors(self, size: int, seed: int, position: Tensor) -> Tensor:
        return torch.eye(size, dtype=torch.float64)[:, None]


@dataclass(frozen=True)
class Hutchinson(Trace):
    """An unbiased estimate of the trace by Rademacher vectors, whose elements are ±1.

        tr J ≈ (1/P) Σ_p z_p·J z_p,   variance 2/P Σ_{i≠j} ((J_ij + J_ji)/2)²

    A sample keeps its vectors along the flow, so that the integrand is smooth. They are a function
    of the seed and of the position of the sample.

    Hutchinson 1989; for the flow, Grathwohl et al. 2018 (1810.01367).

    Args:
        probes: number P of vectors for each sample, at least 1.

    Raises:
        ValueError: there are no probes.
    """

    probes: int = 1

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes is {self.probes}, expected at least 1 random vector")

    @property
    def weight(self) -> float:
        return 1 / self.probes

    def vectors(self, size: int, seed: int, position: Tensor) -> Tensor:
        u = uniform(seed, Stream.TRACE, position, self.probes * size)
        signs = torch.where(u < 0.5, -1.0, 1.0).double()
        return signs.unflatten(1, (self.probes, size)).transpose(0, 1)


def default_trace(size: int) -> Trace:
    """The exact trace up to 64 elements, else one Rademacher vector.

    Args:
        size: number D of elements of x.

    Returns:
        The trace with its default options.
    """
    return ExactTrace() if size <= EXACT_DIMENSIONS else Hutchinson()
