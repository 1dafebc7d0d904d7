"""Aspect-ratio buckets: sizes of about one area, and the bucket of each image."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BucketedImages", "Buckets"]

LARGEST = 2**12
"""Largest number of steps on the longer side of a bucket."""


class BucketedImages(NamedTuple):
    """Which image is read at which size.

    Args:
        sizes: (width, height) of each bucket in pixels.
        image: (N,) int64 index of the image of each item.
        bucket: (N,) int64 index of the bucket of each item in `sizes`.
    """

    sizes: tuple[tuple[int, int], ...]
    image: Tensor
    bucket: Tensor


@dataclass(frozen=True)
class Buckets:
    """Sizes of several aspect ratios; every image is read at the size closest to its own ratio.

    The sizes of resolution R are all pairs of multiples of `step` with

        width · height ≤ R²,   1/aspect ≤ width / height ≤ aspect

    in which neither side can be increased. The bucket of an image is the one that keeps the largest
    share of its area, min(r, r') / max(r, r') for the ratios r of the image and r' of the bucket.
    The image is scaled to cover the bucket and cropped; it is never stretched.

    Args:
        resolutions: side of the square of the largest area in pixels. With several, an image is one
            item for each resolution at which it is not enlarged; the smallest resolution takes
            every image. None: the `size` of the data set. (): the largest multiple of `step` that
            is at most the median √(width · height) of the images.
        step: number of pixels of which all sides are multiples: the factor of the VAE times the
            divisor of the network.
        aspect: largest ratio of the longer to the shorter side of a bucket, at least 1.
        minimum: number of items that a bucket needs. The items of the smallest bucket below it go
            to the next best bucket of the resolution, until no bucket is below it.

    Raises:
        ValueError: A number is out of range, or a resolution is smaller than the step, has too many
            sizes, or has none.

    Example:
        >>> Buckets((256,), step=64, aspect=2).sizes(256)
        ((192, 320), (256, 256), (320, 192))
    """

    resolutions: tuple[int, ...] | None = None
    step: int = 64
    aspect: float = 2.0
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.resolutions is not None:
            object.__setattr__(self, "resolutions", tuple(sorted(set(self.resolutions))))
        if self.step < 1 or self.minimum < 1:
            raise ValueError(
                f"step and minimum are {self.step} and {self.minimum}, expected at least 1"
            )
        if not 1 <= self.aspect < math.inf:
            raise ValueError(f"aspect is {self.aspect}, expected a finite ratio of at least 1")
        for resolution in self.resolutions or ():
            if resolution < self.step:
                raise ValueError(
                    f"the resolution of buckets is {resolution}, expected at least their step of "
                    f"{self.step} pixels: set step to the factor of the VAE times the divisor of "
                    "the network, or a larger resolution"
                )
            if resolution * self.aspect > LARGEST * self.step:
                raise ValueError(
                    f"resolutions contains {resolution}, expected at most {LARGEST} steps of "
                    f"{self.step} pixels on the longer side: increase step"
                )
            if not self.sizes(resolution):
                raise ValueError(
                    f"no sizes have the resolution {resolution}, step {self.step} and aspect "
                    f"{self.aspect}: increase aspect, or use a multiple of step as the resolution"
                )

    def sizes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """The sizes of a resolution.

        Args:
            resolution: side of the square of the largest area in pixels.

        Returns:
            (width, height) of each bucket, by increasing width.
        """
        area = resolution**2

        def largest(side: int) -> int:
            return area // side // self.step * self.step

        widths = range(self.step, int(resolution * self.aspect) + 1, self.step)
        pairs = [(width, largest(width)) for width in widths if largest(width)]
        return tuple(
            (width, height)
            for width, height in pairs
            if largest(height) == width and max(width, height) <= self.aspect * min(width, height)
        )

    def assign(self, width: Tensor, height: Tensor, size: int) -> BucketedImages:
        """Assign images to buckets.

        Args:
            width: (M,) columns of each image.
            height: (M,) rows of each image.
            size: resolution if `resolutions` is None, in pixels.

        Returns:
            The buckets that contain items, sorted by area and width, and the items, sorted by image
            and resolution.

        Raises:
            ValueError: `resolutions` is None, and the size is smaller than the step.
        """
        if self.resolutions is None:
            return replace(self, resolutions=(size,)).assign(width, height, size)
        sides = (width.double() * height).sqrt()
        resolutions = self.resolutions or (self._median(sides),)
        items: list[tuple[int, tuple[int, int]]] = []
        for resolution in resolutions:
            assigner = _Assigner(self.sizes(resolution), self.minimum)
            rows, chosen = assigner(width, height, everything=resolution == resolutions[0])
            items += zip(rows, chosen, strict=True)
        items.sort(key=lambda item: (item[0], math.prod(item[1])))
        sizes = sorted({size for _, size in items}, key=lambda size: (math.prod(size), size))
        index = {size: number for number, size in enumerate(sizes)}
        return BucketedImages(
            tuple(sizes),
            torch.tensor([row for row, _ in items]),
            torch.tensor([index[size] for _, size in items]),
        )

    def _median(self, sides: Tensor) -> int:
        return max(int(sides.median()) // self.step * self.step, self.step)


@dataclass(frozen=True)
class _Assigner:
    """Assigns images to the sizes of one resolution."""

    sizes: tuple[tuple[int, int], ...]
    minimum: int

    def __call__(
        self, width: Tensor, height: Tensor, everything: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The images of this resolution and the size of each.

        Args:
            width: (M,) columns.
            height: (M,) rows.
            everything: whether images are enlarged; otherwise these are left out.

        Returns:
            Indices of images in ascending order, and the size of each.
        """
        kept = self._kept_area(width, height)
        if not everything:
            best = kept.argmax(1)
            is_large = (width >= self._widths[best]) & (height >= self._heights[best])
            rows = is_large.nonzero().flatten()
        else:
            rows = torch.arange(len(width))
        kept = kept[rows]
        while len(rows):
            counts = kept.argmax(1).bincount(minlength=len(self.sizes))
            small = (counts > 0) & (counts < self.minimum)
            if not small.any() or (counts > 0).sum() == 1:
                break
            kept[:, counts.masked_fill(~small, len(rows) + 1).argmin()] = -1.0
        chosen = [self.sizes[size] for size in kept.argmax(1).tolist()] if len(rows) else []
        return rows.tolist(), chosen

    def _kept_area(self, width: Tensor, height: Tensor) -> Tensor:
        """(M, sizes) share of the area of each image that a crop to the ratio of a size keeps."""
        ratio = (width.double() / height)[:, None] / (self._widths / self._heights)
        return torch.minimum(ratio, 1 / ratio)

    @cached_property
    def _widths(self) -> Tensor:
        return torch.tensor([width for width, _ in self.sizes], dtype=torch.float64)

    @cached_property
    def _heights(self) -> Tensor:
        return torch.tensor([height for _, height in self.sizes], dtype=torch.float64)
