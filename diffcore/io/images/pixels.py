"""Pixels of an image file as x_0 of one size."""

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffcore.io.images.reader import read_image

__all__ = ["Fit", "as_pixels"]

Fit = Literal["crop", "pad", "exact"]


def as_pixels(content: bytes, size: int, channels: str, fit: Fit) -> Tensor:
    """Decode an image file to x_0 = v/127.5 - 1 of one size.

    Args:
        content: bytes of the file, see `read_image`.
        size: height and width of x_0 in pixels.
        channels: RGB or L, to which the image is converted. A pixel keeps its stored colour,
            however transparent it is.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).

    Returns:
        x_0 (C, size, size) in [-1, 1], float32.

    Raises:
        ValueError: The image cannot be decoded, or has another size than `exact` requires; the
            message is the reason, to be preceded by the name of the file.
    """
    image = read_image(content).convert(channels)
    if image.size != (size, size):
        image = _fitted(image, size, fit)
    pixels = torch.from_numpy(np.array(image)).view(size, size, -1).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def _fitted(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    if fit == "exact":
        width, height = image.size
        raise ValueError(
            f"it has {width} x {height} pixels, expected exactly {size} x {size}: resize it, or "
            "use fit crop or pad"
        )
    method = ImageOps.pad if fit == "pad" else ImageOps.fit
    return method(image, (size, size), Image.Resampling.LANCZOS)
