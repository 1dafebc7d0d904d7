"""Masks of images: weights of the loss for each pixel, from grey images.

cats/1.png, cats/1.mask.png            beside the image
masks/cats/1.png                       in a folder of masks, with any suffix
"""

import os
from pathlib import Path

from torch import Tensor

from diffcore.io.files import hash_file
from diffcore.io.images.crop import Crop
from diffcore.io.images.pixels import crop_mask
from diffcore.io.images.reader import read_content, read_size
from diffcore.training.data.cache import hash_content
from diffcore.training.data.image_files import MASK, ImageFiles
from diffcore.training.data.listing import printable
from diffcore.training.data.scan import SUFFIXES

__all__ = ["MaskFiles"]


class MaskFiles:
    """The mask of each image of a folder.

    White is a weight of 1, black of 0. A mask is turned upright, cropped and mirrored as its image,
    and averaged over the area of each pixel of x_0.

    Args:
        images: images of the data folder.
        folder: folder of masks with the paths of the images, or the word beside, for masks beside
            the images.

    Raises:
        ValueError: An image has no mask, or one of another size, or images are padded.
    """

    def __init__(self, images: ImageFiles, folder: str) -> None:
        if images.fit == "pad":
            raise ValueError("masks of padded images are not supported: use fit crop or exact")
        self.paths = [_find(images.folder, name, folder) for name in images.names]
        missing = [name for name, path in zip(images.names, self.paths, strict=True) if not path]
        if missing:
            place = f"NAME{MASK}png beside it" if folder == "beside" else f"a file in {folder}"
            raise ValueError(
                f"{len(missing)} of {len(images)} images have no mask, such as "
                f"{printable(missing[0])}: expected {place}; a white mask selects a whole image"
            )
        for index, path in enumerate(self.paths):
            _check_size(path, (int(images.width[index]), int(images.height[index])))
        self.hashes = [hash_file(path) for path in self.paths if path]

    def read(self, index: int, crop: Crop, factor: int = 1) -> Tensor:
        """The weights of an image.

        Args:
            index: index of the image.
            crop: crop of the image.
            factor: number of pixels on the side of a pixel of x_0, that of the VAE.

        Returns:
            (1, H / factor, W / factor) weights in [0, 1].

        Raises:
            ValueError: The mask cannot be read, or has another size than its image.
        """
        path = self.paths[index]
        assert path is not None
        try:
            return crop_mask(read_content(path), crop, factor)
        except ValueError as error:
            raise ValueError(f"the mask {printable(path)} cannot be read: {error}") from None

    @property
    def content_hash(self) -> str:
        """Hash of the contents of all masks."""
        return hash_content(*self.hashes)


def _check_size(path: Path | None, expected: tuple[int, int]) -> None:
    """Raise ValueError if a mask has another size than its image."""
    assert path is not None
    try:
        found = read_size(path)
    except ValueError as error:
        raise ValueError(f"the mask {printable(path)} cannot be read: {error}") from None
    if found != expected:
        raise ValueError(
            f"the mask {printable(path)} has {found[0]} x {found[1]} pixels, but its image has "
            f"{expected[0]} x {expected[1]}: make the mask again at the size of the image"
        )


def _find(images: Path, name: str, folder: str) -> Path | None:
    """The mask of an image, with one of the suffixes of images."""
    stem = os.path.splitext(name)[0]
    base = f"{images / stem}.mask" if folder == "beside" else f"{Path(folder) / stem}"
    found = (Path(base + suffix) for suffix in (".png", *SUFFIXES))
    return next((path for path in found if path.is_file()), None)
