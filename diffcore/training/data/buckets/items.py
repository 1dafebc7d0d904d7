"""The items of a folder of images: which image is read for an item, and which part of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.io.images.crop import CENTRE, Crop
from diffcore.training.data.buckets.groups import Groups
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.image_files import ImageFiles

__all__ = ["ImageItems", "Visit"]


class Visit(NamedTuple):
    """One of the crops of an item that are encoded.

    Args:
        item: index of the item.
        crop: number of the crop.
        is_mirrored: whether the image is mirrored.
    """

    item: int
    crop: int = 0
    is_mirrored: bool = False


class ImageItems:
    """The images of a folder, at one size or at the sizes of their buckets.

    Args:
        images: the image files.
        buckets: sizes of several aspect ratios; None for squares of the size of `images`.

    Raises:
        ValueError: The images are padded, or have one exact size, and there are buckets.
    """

    image: Tensor
    """(N,) index of the image of each item."""

    def __init__(self, images: ImageFiles, buckets: Buckets | None) -> None:
        self.images, self.has_buckets = images, buckets is not None
        if buckets is None:
            self.image = torch.arange(len(images))
            self.bucket = torch.zeros_like(self.image)
            self.sizes: tuple[tuple[int, int], ...] = ((images.size, images.size),)
            return
        if images.fit != "crop":
            raise ValueError(
                f"fit is {images.fit}, but images are cropped to the size of their bucket: use fit "
                "crop, or leave buckets out"
            )
        self.sizes, self.image, self.bucket = buckets.assign(
            images.width, images.height, images.size
        )

    def __len__(self) -> int:
        return len(self.image)

    def size(self, index: int) -> tuple[int, int]:
        """Size at which an item is read.

        Args:
            index: index of the item.

        Returns:
            (width, height) in pixels.
        """
        return self.sizes[int(self.bucket[index])]

    def crop(self, index: int, offset: float = CENTRE, is_mirrored: bool = False) -> Crop:
        """The crop of an item.

        Args:
            index: index of the item.
            offset: position of the crop along the side that is cut, in [0, 1].
            is_mirrored: whether the image is mirrored.

        Returns:
            The crop of the upright image.
        """
        image = int(self.image[index])
        source = int(self.images.width[image]), int(self.images.height[image])
        return Crop(source, self.size(index), offset, is_mirrored)

    def read(self, index: int, crop: Crop) -> Tensor:
        """x_0 (C, H, W) in [-1, 1] of an item.

        Args:
            index: index of the item.
            crop: crop of the item; of a padded image only `is_mirrored` is used.

        Returns:
            x_0.

        Raises:
            ValueError: The file can no longer be read; the message contains its path.
        """
        return self.images.read(int(self.image[index]), crop)

    def groups(self, channels: int, factor: int = 1) -> Groups | None:
        """The buckets of the items.

        Args:
            channels: number of channels of x_0.
            factor: number of pixels on the side of a pixel of x_0, that of the VAE.

        Returns:
            The groups; None without buckets.

        Raises:
            ValueError: A side of a bucket is no multiple of the factor.
        """
        if not self.has_buckets:
            return None
        for side in {side for size in self.sizes for side in size}:
            if side % factor:
                raise ValueError(
                    f"buckets have sides of {side} pixels, expected multiples of {factor}, the "
                    f"pixels of a latent: set buckets.step to a multiple of {factor}"
                )
        shapes = [(channels, height // factor, width // factor) for width, height in self.sizes]
        return Groups(tuple(shapes), self.bucket)
