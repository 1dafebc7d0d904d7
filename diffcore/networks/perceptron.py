"""A perceptron for points in R^n."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from diffcore.networks.embedding import ConditionEmbedding

__all__ = ["Perceptron"]


class Perceptron(nn.Module):
    """A residual multilayer perceptron, for points in R^n and other data of few numbers.

        h_0 = A x,   h_k = h_{k-1} + B_k silu(h_{k-1} + C_k c),   output = D silu(h_last)

    A, B_k, C_k and D are affine maps, and c embeds the noise level and the class. D is 0 at
    initialisation. `process.time` must be an index of about 0 .. 999, as by default.

    Args:
        shape: shape of one x_0, such as [2] for points in the plane; its entries are one vector.
        width: even number of hidden features.
        layers: number of residual layers, at least 1.
        classes: number of classes, equal to `process.classes`; 0: no labels.
        learns_variance: whether the output has a second half of channels, for a process whose
            variance is learned.
        inputs: number of channels of its input; 0: those of x_0. Further channels follow those of
            x, such as conditions (`ConcatenatedChannels`) or the times of learned levels.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> import torch
        >>> Perceptron([2], width=8)(torch.ones(3, 2), torch.zeros(3))
        tensor([[0., 0.],
                [0., 0.],
                [0., 0.]], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        width: int = 128,
        layers: int = 4,
        classes: int = 0,
        learns_variance: bool = False,
        inputs: int = 0,
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape is {list(shape)}, expected the positive sizes of one x_0")
        if inputs and inputs < shape[0]:
            raise ValueError(f"inputs is {inputs}, expected 0 or at least {shape[0]} channels")
        if layers < 1:
            raise ValueError(f"layers is {layers}, expected at least 1")
        size = math.prod(shape)
        self.condition = ConditionEmbedding(width, classes)
        self.first = nn.Linear(size // shape[0] * (inputs or shape[0]), width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.last = nn.Linear(width, size * (2 if learns_variance else 1))
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output at a noise level.

        Args:
            x: (B, *shape) noisy data, with further channels if `inputs` is above those of x_0.
            time: (B,) index of the noise level.
            class_labels: (B,) labels, if there are classes.

        Returns:
            (B, *shape) the quantity that `process.prediction` names; with a learned variance the
            first axis of the shape is twice as long.
        """
        hidden, condition = self.first(x.flatten(1)), self.condition(time, class_labels)
        for layer in self.layers:
            hidden = layer(hidden, condition)
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output.view(len(x), -1, *x.shape[2:])


class _Layer(nn.Module):
    """h + B silu(h + C c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.condition = nn.Linear(width, width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        update: Tensor = self.linear(nn.functional.silu(hidden + self.condition(condition)))
        return hidden + update
