"""Each item with a hole as a condition: the data of inpainting."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffcore.core.random import Stream, uniform
from diffcore.training.data.conditioned.derived import DerivedConditions

__all__ = ["MaskedImages"]


class MaskedImages(DerivedConditions):
    """A data set whose items have a random mask and themselves outside of it as conditions.

        m = 1 in the union of `boxes` boxes, else 0,   c = (1 - m) x_0

    The sides of a box are uniform in [low, high] of the sides of the image, rounded to pixels, and
    its place is uniform where the whole box is inside; all are keyed by the position in the run.
    The mask is 1 where the network fills the image in, as in the inpainting networks of Diffusers;
    that of `diffcore.editing.RePaint` is its complement, True where the image is known.

    Args:
        data: data set of images.
        low: smallest side of a box, as a share of the side of the image.
        high: largest side of a box, as a share of the side of the image, at most 1.
        boxes: number of boxes of a mask.
        image: name of the condition c (C, H, W) in the process.
        mask: name of the condition m (1, H, W) in the process.

    Raises:
        ValueError: A number is out of range, both conditions have one name, or the data are
            latents.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = MaskedImages(TensorDataset(torch.ones(3, 1, 8, 8)), low=0.5, high=0.5)
        >>> x0, _, conditions = data[0]
        >>> int(conditions["mask"].sum()), int(conditions["masked"].sum())
        (16, 48)
    """

    def __init__(
        self,
        data: Dataset,  # type: ignore[type-arg]  # jsonargparse reads the bare class
        low: float = 0.25,
        high: float = 0.75,
        boxes: int = 1,
        image: str = "masked",
        mask: str = "mask",
    ) -> None:
        super().__init__(data)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low and high are {low} and {high}, expected 0 <= low <= high <= 1")
        if boxes < 1:
            raise ValueError(f"boxes is {boxes}, expected at least 1")
        if image == mask:
            raise ValueError(f"image and mask are both {mask!r}, expected two names")
        self.low, self.high, self.boxes = low, high, boxes
        self.image, self.mask = image, mask

    def _derive(self, x0: Tensor, seed: int, position: int) -> dict[str, Tensor]:
        if x0.ndim != 3:
            raise ValueError(f"x_0 has the shape {tuple(x0.shape)}, expected (C, H, W)")
        mask = torch.zeros(1, *x0.shape[1:])
        numbers = uniform(seed, Stream.MASK, position, 4 * self.boxes).view(self.boxes, 2, 2)
        for box in numbers.tolist():
            rows, columns = (
                self._interval(side, *pair) for side, pair in zip(x0.shape[1:], box, strict=True)
            )
            mask[:, rows, columns] = 1
        return {self.image: x0.masked_fill(mask.bool(), 0.0), self.mask: mask}

    def _interval(self, side: int, length: float, place: float) -> slice:
        """The pixels of a box along an axis of `side` pixels, for two uniform numbers."""
        pixels = round(side * (self.low + (self.high - self.low) * length))
        first = int(place * (side - pixels + 1))
        return slice(first, first + pixels)

    def _options(self) -> tuple[Any, ...]:
        return self.low, self.high, self.boxes, self.image, self.mask
