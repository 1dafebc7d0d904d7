"""Small grey images as tiles of a figure, with a margin in which their edges are visible."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.report.figures import Theme, current_theme

__all__ = ["show_tiles"]

MARGIN: dict[Theme, tuple[float, float, float]] = {
    "light": (0.66, 0.68, 0.72),
    "dark": (0.25, 0.27, 0.31),
}
"""Red, green and blue between the tiles: neither white nor black, which images may end in."""


def show_tiles(axis: Any, x: Tensor, rows: Sequence[str] = ()) -> None:
    """Draw grey images side by side, with the names of their rows on the left.

    Args:
        axis: axes of matplotlib, which lose their ticks and spines.
        x: images (rows, columns, 1, H, W) with values from -1 to 1.
        rows: names of the rows; empty: none.
    """
    height, width = x.shape[-2:]
    grey = (x[:, :, 0].clamp(-1, 1) + 1) / 2
    margin = torch.tensor(MARGIN[current_theme()])
    tiles = margin.repeat(*grey.shape[:2], height + 1, width + 1, 1)
    tiles[:, :, 1:, 1:] = grey[..., None].expand(-1, -1, -1, -1, 3).to(tiles)
    joined = tiles.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    frame = margin.repeat(joined.shape[0] + 1, joined.shape[1] + 1, 1)
    frame[:-1, :-1] = joined
    axis.imshow(frame, zorder=1)
    places = [(height + 1) * i + (height + 1) / 2 for i in range(len(rows))]
    axis.set(xticks=[], yticks=places, yticklabels=rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_axisbelow(True)
