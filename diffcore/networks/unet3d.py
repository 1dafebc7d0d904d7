"""A U-Net of 3-D convolutions for volumes and short videos."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcore.networks.embedding import ConditionEmbedding

__all__ = ["UNet3d"]


class UNet3d(nn.Module):
    """A U-Net of 3-D convolutions, for volumes (C, D, H, W) and short videos (C, T, H, W).

    Every level below the first halves all three sizes, by averages. Each level has a residual block
    on the way down and one on the way up, which also receives the features of the way down. The
    last convolution is 0 at initialisation. `process.time` must be an index of about 0 .. 999, as
    by default.

    Args:
        channels: number of channels of one x_0.
        widths: features of the levels, multiples of `groups`, the finest level first.
        groups: number of groups of the group norms.
        classes: number of classes, equal to `process.classes`; 0: no labels.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> UNet3d(widths=[8, 8])(torch.ones(2, 1, 4, 6, 6), torch.zeros(2)).shape
        torch.Size([2, 1, 4, 6, 6])
    """

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        groups: int = 8,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if channels < 1 or groups < 1:
            raise ValueError(f"channels is {channels} and groups is {groups}, expected at least 1")
        if not widths or min(widths) < 1 or any(width % groups for width in widths):
            raise ValueError(
                f"widths is {list(widths)}, expected positive multiples of groups = {groups}"
            )
        size = 4 * widths[0]
        self.condition = ConditionEmbedding(size, classes)
        self.first = nn.Conv3d(channels, widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            _Block(a, b, size, groups) for a, b in zip(before, widths, strict=True)
        )
        # The way up ends each level with the features that the next finer one expects.
        self.up = nn.ModuleList(
            _Block(2 * b, a, size, groups)
            for a, b in reversed(list(zip(before, widths, strict=True)))
        )
        self.norm = nn.GroupNorm(groups, widths[0])
        self.last = nn.Conv3d(widths[0], channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output at a noise level.

        Args:
            x: (B, C, D, H, W) noisy data; its sizes are multiples of 2^(levels - 1).
            time: (B,) index of the noise level.
            class_labels: (B,) labels, if there are classes.

        Returns:
            (B, C, D, H, W) the quantity that `process.prediction` names.

        Raises:
            ValueError: x has another number of axes, or sizes that cannot be halved.
        """
        self._check_sizes(x)
        hidden, condition = self.first(x), self.condition(time, class_labels)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            hidden = block(functional.avg_pool3d(hidden, 2) if level else hidden, condition)
            skips.append(hidden)
        for block in self.up:
            skip = skips.pop()
            if hidden.shape[2:] != skip.shape[2:]:
                hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
            hidden = block(torch.cat((hidden, skip), 1), condition)
        output: Tensor = self.last(functional.silu(self.norm(hidden)))
        return output

    def _check_sizes(self, x: Tensor) -> None:
        factor = 2 ** (len(self.down) - 1)
        if x.ndim != 5 or any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"x has the shape {tuple(x.shape)}, expected (B, C, D, H, W) with sizes that are "
                f"multiples of {factor}: set network.widths to fewer levels, or crop the data"
            )


class _Block(nn.Module):
    """Two convolutions with group norms; the condition scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, condition: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        modulation = self.modulation(functional.silu(condition))[..., None, None, None]
        scale, shift = modulation.chunk(2, 1)
        hidden = self.conv2(functional.silu(self.norm2(hidden) * (1 + scale) + shift))
        output: Tensor = self.skip(x) + hidden
        return output
