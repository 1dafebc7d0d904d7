"""Pixels of an image file as x_0, and of a mask file as weights."""

from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffcore.io.images.crop import Crop
from diffcore.io.images.reader import read_image
from diffcore.io.network_size import check_memory

__all__ = ["Fit", "as_pixels", "check_options", "crop_mask", "crop_pixels"]

Fit = Literal["crop", "pad", "exact"]


def check_options(size: int, channels: str, fit: str) -> None:
    """Check the options of `as_pixels`.

    Args:
        size: height and width of x_0 in pixels, at least 1.
        channels: RGB or L.
        fit: crop, pad or exact.

    Raises:
        ValueError: The size is not positive, one image does not fit the memory of this machine, or
            a choice is unknown.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected a positive number of pixels")
    check_memory(4 * len(channels) * size**2, f"size is {size}: a batch of one such image")
    for name, value, allowed in (
        ("channels", channels, ("RGB", "L")),
        ("fit", fit, get_args(Fit)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


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
    return _scaled(image)


def crop_pixels(content: bytes, channels: str, crop: Crop) -> Tensor:
    """Decode an image file to x_0 = v/127.5 - 1 of a crop, scaled by one antialiased factor.

    Args:
        content: bytes of the file, see `read_image`.
        channels: RGB or L, to which the image is converted, see `as_pixels`.
        crop: the part that is kept, and its size.

    Returns:
        x_0 (C, H, W) in [-1, 1], float32.

    Raises:
        ValueError: The image cannot be decoded, or has another size than that of the crop; the
            message is the reason, to be preceded by the name of the file.
    """
    image = _checked(content, crop).convert(channels)
    return _scaled(crop.apply(image, Image.Resampling.LANCZOS))


def crop_mask(content: bytes, crop: Crop, factor: int = 1) -> Tensor:
    """Decode a mask file to weights v/255, averaged over the area of each pixel of x_0.

    Args:
        content: bytes of the file, see `read_image`; colours are converted to grey values.
        crop: the crop of the image that the mask belongs to.
        factor: number of pixels of the image on the side of a pixel of x_0, that of the VAE.

    Returns:
        (1, H / factor, W / factor) weights in [0, 1], float32; exactly 0 where all pixels are 0.

    Raises:
        ValueError: The mask cannot be decoded, or has another size than the image; the message is
            the reason, to be preceded by the name of the file.
    """
    image = _checked(content, crop).convert("L").convert("F")
    small = crop.apply(image, Image.Resampling.BOX, factor)
    return torch.from_numpy(np.array(small) / np.float32(255)).clamp(0, 1)[None]


def _checked(content: bytes, crop: Crop) -> Image.Image:
    """The image of a file, of the size of the source of a crop."""
    image = read_image(content)
    if image.size != crop.source:
        (width, height), (expected, rows) = image.size, crop.source
        raise ValueError(
            f"it has {width} x {height} pixels, expected {expected} x {rows}: restore it, or start "
            "a new run"
        )
    return image


def _scaled(image: Image.Image) -> Tensor:
    """v/127.5 - 1 as (C, H, W)."""
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _fitted(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    if fit == "exact":
        width, height = image.size
        raise ValueError(
            f"it has {width} x {height} pixels, expected exactly {size} x {size}: resize it, or "
            "use fit crop or pad"
        )
    method = ImageOps.pad if fit == "pad" else ImageOps.fit
    return method(image, (size, size), Image.Resampling.LANCZOS)
