"""Two half circles in the plane."""

import math

import torch
from torch import Tensor

from diffcore.core.random import Stream, normal
from diffcore.training.data.generated.generated import GeneratedData

__all__ = ["TwoMoons"]


class TwoMoons(GeneratedData):
    """Points near two interleaved half circles in the plane, a label for each half circle.

        label 0:  ((cos θ, sin θ) - m + noise ξ)/√2
        label 1:  ((1 - cos θ, ½ - sin θ) - m + noise ξ)/√2

    θ is uniform in (0, π), ξ ~ N(0, I), and m = (½, ¼) is the mean. The standard deviation is 0.50
    over both coordinates. Item i has the label i mod 2. They are the half circles of
    `sklearn.datasets.make_moons`.

    Args:
        count: number of points.
        noise: standard deviation of the distance from a half circle of radius 1.
        seed: 64-bit seed; another one gives independent points.

    Raises:
        ValueError: there are no points, or the noise is negative.

    Example:
        >>> x0, label = TwoMoons(4)[1]
        >>> x0.shape, label
        (torch.Size([2]), 1)
    """

    labels: Tensor
    class_names = ("upper", "lower")

    def __init__(self, count: int = 20_000, noise: float = 0.1, seed: int = 0) -> None:
        super().__init__(count, seed, noise)
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise is {noise}, expected a standard deviation of at least 0")
        self.labels = torch.arange(count) % 2
        angle = math.pi * self._uniform(1)[:, 0]
        upper = torch.stack((angle.cos(), angle.sin()), 1)
        lower = torch.tensor((1.0, 0.5)) - upper
        points = torch.where(self.labels[:, None] == 0, upper, lower) - torch.tensor((0.5, 0.25))
        offset = normal(seed, Stream.ITEM_NOISE, torch.arange(count), (2,))
        self.x0 = ((points + noise * offset) / math.sqrt(2)).float()
