"""Statistics of images that guidance and the terminal SNR change: brightness, contrast, colour."""

import torch
from torch import Tensor

__all__ = ["STATISTICS", "image_statistics", "summarize_statistics"]

STATISTICS = ("brightness", "contrast", "saturation", "clipped")
"""The columns of `image_statistics`."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""


def image_statistics(images: Tensor) -> Tensor:
    """Statistics of each image, from 0 to 1.

    brightness: mean of the luma. contrast: standard deviation of the luma over the pixels.
    saturation: mean of (max - min) / max over red, green and blue, 0 for black and for grey
    images. clipped: share of values that are 0 or 255.

    Args:
        images: (N, C, H, W) bytes of 1 or 3 channels.

    Returns:
        (N, 4) float64 values, in the order of `STATISTICS`.
    """
    x = images.double() / 255
    weights = torch.tensor(LUMA if x.shape[1] == 3 else (1.0,), dtype=torch.float64)
    luma = torch.einsum("nchw,c->nhw", x, weights).flatten(1)
    high, low = x.amax(1), x.amin(1)
    saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-9), 0.0)
    clipped = ((images == 0) | (images == 255)).double()
    columns = (
        luma.mean(1),
        luma.std(1, correction=0),
        saturation.flatten(1).mean(1),
        clipped.flatten(1).mean(1),
    )
    return torch.stack(columns, 1)


def summarize_statistics(statistics: Tensor) -> dict[str, float]:
    """Means over images, and the standard deviation of the brightness over images.

    Samples of a schedule that does not end in pure noise have too little of the latter.

    Args:
        statistics: (N, 4) result of `image_statistics`.

    Returns:
        A number for each name in `STATISTICS`, and brightness_spread.
    """
    means = dict(zip(STATISTICS, statistics.double().mean(0).tolist(), strict=True))
    spread = float(statistics[:, 0].double().std(correction=0))
    return {**means, "brightness_spread": spread}
