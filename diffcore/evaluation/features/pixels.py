"""Pixels as features: for small images, such as the digits."""

from torch import Tensor

from diffcore.evaluation.features.extractor import Extracted, FeatureExtractor, without_logits

__all__ = ["PixelFeatures"]

MAXIMUM = 4096
"""Largest number of values of an image: distances need many more images than features."""


class PixelFeatures(FeatureExtractor):
    """The values of an image, from 0 to 1. Images are not resized."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Extracted:
        """The values of each image.

        Args:
            images: (N, C, H, W) bytes.

        Returns:
            (N, C H W) features.

        Raises:
            ValueError: an image has too many values.
        """
        features = images.flatten(1).float() / 255
        if features.shape[1] > MAXIMUM:
            raise ValueError(
                f"images have {features.shape[1]} values, expected at most {MAXIMUM} with the "
                "features `pixels`: name a network, --features FILE of `diffcore features train`"
            )
        return without_logits(features)
