"""The contract of feature extractors, and the resizing that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["Extracted", "FeatureExtractor", "resize", "to_rgb", "without_logits"]


class Extracted(NamedTuple):
    """What an extractor computes from images.

    Args:
        features: (N, d) float32 features on the host.
        logits: (N, K) float32 logits of a classifier on the host; (N, 0) without one.
    """

    features: Tensor
    logits: Tensor


class FeatureExtractor(ABC):
    """Maps images to features, deterministically, each image by itself.

    Attributes:
        name: name for records, such as "pixels".
        digest: SHA-256 of the weights; "" if there are none.
        resizing: how images are resized, for records.
        classes: number of class labels of the data that the logits predict; 0: they predict none.
    """

    name: str
    digest: str = ""
    resizing: str = "none"
    classes: int = 0

    def embed_texts(self, texts: Sequence[str]) -> Tensor | None:
        """Embeddings of texts in the space of the features.

        Args:
            texts: texts.

        Returns:
            (N, d) float32 embeddings on the host; None if the network embeds images only.
        """
        return None

    @abstractmethod
    def __call__(self, images: Tensor) -> Extracted:
        """Compute features.

        Args:
            images: (N, C, H, W) bytes of 1 or 3 channels.

        Returns:
            Features, and the logits if there is a classifier.
        """


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to squares by cubic interpolation with antialiasing.

    Without antialiasing a smaller image depends on single pixels, which changes Fréchet distances
    (Parmar, Zhang & Zhu 2022, arXiv:2104.11222).

    Args:
        images: (N, C, H, W) bytes.
        size: height and width of the result in pixels.

    Returns:
        (N, C, size, size) float32 values from 0 to 255, not rounded.
    """
    x = images.float()
    if x.shape[-2:] == (size, size):
        return x
    resized = interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255)


def to_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of grey images.

    Args:
        images: (N, C, H, W) images of 1 or 3 channels.

    Returns:
        (N, 3, H, W) images.
    """
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def without_logits(features: Tensor) -> Extracted:
    """The result of an extractor that has no classifier.

    Args:
        features: (N, d) features on any device.

    Returns:
        Features in float32 on the host, and logits (N, 0).
    """
    return Extracted(features.float().cpu(), torch.zeros(len(features), 0))
