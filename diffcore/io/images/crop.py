"""The part of an image that fills a size without a change of the aspect ratio."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

__all__ = ["CENTRE", "Crop"]

CENTRE = 0.5
"""Offset of a central crop."""


@dataclass(frozen=True)
class Crop:
    """Scale an image by one factor until it covers a size, then cut the rest off.

        s = max(W / w, H / h),   left = u (s w - W),   top = u (s h - H)

    One of the two is 0. The resampling filter of Pillow is antialiased, and takes the box of the
    source with its fractions of pixels: the scale is exactly s in both directions.

    Args:
        source: (w, h) of the upright image in pixels.
        target: (W, H) of the result in pixels.
        offset: u in [0, 1]; ½ is the centre.
        is_mirrored: whether the result is mirrored left to right.

    Example:
        >>> Crop((300, 100), (100, 100), 0.25).box
        (50.0, 0.0, 150.0, 100.0)
    """

    source: tuple[int, int]
    target: tuple[int, int]
    offset: float = CENTRE
    is_mirrored: bool = False

    @property
    def scale(self) -> float:
        """The factor s by which both sides are scaled."""
        return max(new / old for new, old in zip(self.target, self.source, strict=True))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, upper, right and lower bound of the part that is kept, in pixels of the source."""
        (width, height), (w, h) = self.target, self.source
        kept = min(width / self.scale, w), min(height / self.scale, h)
        left, top = self.offset * (w - kept[0]), self.offset * (h - kept[1])
        return left, top, left + kept[0], top + kept[1]

    @property
    def sizes(self) -> Tensor:
        """(6,) what Stable Diffusion XL is conditioned on, in its order.

        Returns:
            Height and width of the source; top and left of the crop in the scaled image, from the
            right side if it is mirrored; height and width of the target.
        """
        (width, height), (w, h) = self.target, self.source
        left, top, right, _ = self.box
        edge = w - right if self.is_mirrored else left
        crop = top * self.scale, edge * self.scale
        return torch.tensor([h, w, *crop, height, width], dtype=torch.float32)

    def apply(self, image: Image.Image, resample: Image.Resampling, factor: int = 1) -> Image.Image:
        """The result.

        Args:
            image: image of the size of the source.
            resample: filter of Pillow.
            factor: number of pixels of the target on the side of a pixel of the result.

        Returns:
            The image of the size of the target divided by the factor.
        """
        width, height = (side // factor for side in self.target)
        resized = image.resize((width, height), resample, box=self.box)
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.is_mirrored else resized
