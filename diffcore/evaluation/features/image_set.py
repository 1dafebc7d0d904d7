"""Images to evaluate, as bytes: those of a data set, and those of files that were sampled."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffcore.io.images.reader import read_content, read_image
from diffcore.training.data.checks import split_item
from diffcore.training.data.source import DataSource

__all__ = ["FileImages", "ImageSet", "SourceImages"]

TOLERANCE = 1e-3
"""How far a value may lie beyond the range, as a part of it."""


class ImageSet(ABC):
    """A sequence of images of one size, with labels.

    Attributes:
        name: name for records and messages.
        labels: (N,) class label of each image; -1 without one.
    """

    name: str
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, rows: range) -> Tensor:
        """Read some images.

        Args:
            rows: indices of the images.

        Returns:
            (len(rows), C, H, W) bytes.
        """


class SourceImages(ImageSet):
    """The images of a data set, without augmentation, rounded to 8 bits as image files are.

    Args:
        source: data set whose x_0 are images of 1 or 3 channels.
        low: value of black.
        high: value of white.
        name: name of the data set.

    Raises:
        ValueError: x_0 are latents, or no images, or of several sizes.
    """

    def __init__(
        self, source: DataSource, low: float = -1.0, high: float = 1.0, name: str = "data"
    ) -> None:
        if source.is_latent:
            raise ValueError(
                f"{name} holds latents, expected images: name the folder of the images"
            )
        if source.groups is not None and len(source.groups.shapes) > 1:
            raise ValueError(
                f"{name} has images of {len(source.groups.shapes)} sizes (buckets), expected one "
                "size: name the folder of the images"
            )
        self.source, self.low, self.high, self.name = source, low, high, name
        x0 = split_item(source[0], 0)[0]
        if x0.ndim != 3 or x0.shape[0] not in (1, 3):
            raise ValueError(
                f"{name} has items of shape {tuple(x0.shape)}, expected images (C, H, W) of 1 or 3 "
                "channels"
            )
        self.shape = tuple(x0.shape)
        self.labels = self._labels()

    def _labels(self) -> Tensor:
        if self.source.labels is not None:
            return torch.as_tensor(self.source.labels)
        items = range(len(self.source))
        return torch.tensor([split_item(self.source[index], index)[1] for index in items])

    def read(self, rows: range) -> Tensor:
        x0 = torch.stack([split_item(self.source[index], index)[0] for index in rows])
        share = (x0.double() - self.low) / (self.high - self.low)
        if float(share.min()) < -TOLERANCE or float(share.max()) > 1 + TOLERANCE:
            raise ValueError(
                f"{self.name} has values from {float(x0.min()):.4g} to {float(x0.max()):.4g}, "
                f"expected {self.low:g} to {self.high:g}"
            )
        return (share.clamp(0, 1) * 255).round().byte()


class FileImages(ImageSet):
    """Image files of one size.

    Args:
        paths: files.
        labels: (N,) class label of each file; -1 without one.
        name: name for records.
    """

    def __init__(self, paths: Sequence[str | Path], labels: Tensor, name: str) -> None:
        self.paths, self.labels, self.name = list(paths), labels, name

    def read(self, rows: range) -> Tensor:
        pictures = [read_image(read_content(self.paths[row])) for row in rows]
        arrays = [np.atleast_3d(np.asarray(picture)) for picture in pictures]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
