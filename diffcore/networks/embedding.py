"""The vector by which the layers of a network are conditioned on noise level and class."""

import math

import torch
from torch import Tensor, nn

from diffcore.core.prediction import at_least_float32

__all__ = ["ConditionEmbedding", "sinusoids"]

LONGEST = 10_000
"""Longest wavelength of the sinusoids divided by 2π, as in Vaswani et al. 2017 and in diffusers."""


def sinusoids(number: Tensor, count: int) -> Tensor:
    """Sinusoidal features of numbers, cos(ω_i n) and sin(ω_i n).

        ω_i = 10000^(-i/h),   i = 0 .. h - 1,   h = count/2

    Source: Vaswani et al. 2017 (1706.03762, section 3.5).

    Args:
        number: (B,) numbers, such as the index of a noise level in 0 .. 999.
        count: even number of features.

    Returns:
        (B, count) features in the dtype of the numbers, at least float32.

    Example:
        >>> sinusoids(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    number = at_least_float32(number)
    exponent = torch.arange(count // 2, device=number.device, dtype=number.dtype) / (count // 2)
    angle = number[:, None] * torch.exp(-math.log(LONGEST) * exponent)
    return torch.cat((angle.cos(), angle.sin()), 1)


class ConditionEmbedding(nn.Module):
    """Embedding of the noise level, plus that of the class if there are classes.

    Args:
        width: even number of features of the embedding.
        classes: number of classes; the label `classes` is the null label. 0: no labels.

    Raises:
        ValueError: the width is odd or not positive, or the number of classes is negative.
    """

    def __init__(self, width: int, classes: int = 0) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}, expected an even number of features, at least 2")
        if classes < 0:
            raise ValueError(f"classes is {classes}, expected 0 for none or the number of labels")
        self.width = width
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The embedding of a batch.

        Args:
            time: (B,) index of the noise level, 0 .. 999.
            class_labels: (B,) labels; None for the null label, or without classes.

        Returns:
            (B, width) vectors.

        Raises:
            ValueError: there are labels, and the embedding has no classes.
        """
        if class_labels is not None and self.label is None:
            raise ValueError(
                "the process has classes, and the network was built without them: set the "
                "network's classes to process.classes, or process.classes to 0"
            )
        features = sinusoids(time, self.width).to(self.first.weight.dtype)
        vector: Tensor = self.second(nn.functional.silu(self.first(features)))
        if self.label is None:
            return vector
        if class_labels is None:
            class_labels = torch.full_like(time, self.label.num_embeddings - 1, dtype=torch.int64)
        return vector + self.label(class_labels)
