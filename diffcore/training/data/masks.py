"""Masks of images: weights of the loss for each pixel, from grey images.

cats/1.png, cats/1.mask.png            beside the image
masks/cats/1.png                       in a folder of masks, with any suffix
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from diffcore.io.images.crop import Crop
from diffcore.io.images.pixels import crop_mask
from diffcore.io.images.reader import read_content
from diffcore.training.data.cache import hash_content
from diffcore.training.data.image_files import MASK, ImageFiles
from diffcore.training.data.listing import PackedTexts, printable
from diffcore.training.data.scan import SUFFIXES, FolderScan, scan_folder

__all__ = ["MaskFiles"]

LISTED = 3
"""Number of black masks that a message lists."""


class MaskFiles:
    """The mask of each image of a folder.

    White is a weight of 1, black of 0. A mask is turned upright, cropped and mirrored as its image,
    and averaged over the area of each pixel of x_0. Its size and hash are those of the recorded
    scan of its folder, see `scan_folder`.

    Args:
        images: images of the data folder.
        folder: folder of masks with the paths of the images, or the word beside, for masks beside
            the images.
        verify: True compares the hash of every mask of another folder with the recorded scan.

    A black mask leaves its image without a loss. Such masks are reported by name on stderr, once
    and by the first rank, because a mask that was made automatically may have found nothing.

    Raises:
        ValueError: An image has no mask, a damaged one, or one of another size, images are padded,
            or all masks are black.
    """

    def __init__(self, images: ImageFiles, folder: str, verify: bool = False) -> None:
        if images.fit == "pad":
            raise ValueError("masks of padded images are not supported: use fit crop or exact")
        is_beside = folder == "beside"
        self.folder = images.folder if is_beside else Path(folder)
        scan = images.scan if is_beside else scan_folder(folder, verify)
        self.names = scan.files.names
        self.rows = _match(images.names, self.names, ".mask" if is_beside else "")
        missing = (self.rows < 0).nonzero().flatten().tolist()
        if missing:
            place = f"NAME{MASK}png beside it" if is_beside else f"a file in {folder}"
            raise ValueError(
                f"{len(missing)} of {len(images)} images have no mask, such as "
                f"{printable(images.names[missing[0]])}: expected {place}; a white mask selects a "
                "whole image"
            )
        self._check_sizes(images, scan)
        self._report_black(scan)
        self.hashes = scan.sha256[self.rows]

    def _check_sizes(self, images: ImageFiles, scan: FolderScan) -> None:
        """Raise ValueError if a mask cannot be read, or has another size than its image."""
        width, height = scan.width[self.rows], scan.height[self.rows]
        is_other = (width != images.width) | (height != images.height)
        for index in is_other.nonzero().flatten().tolist()[:1]:
            path = printable(self._path(index))
            if reason := scan.reasons.get(int(self.rows[index])):
                raise ValueError(f"the mask {path} cannot be read: {reason}")
            raise ValueError(
                f"the mask {path} has {width[index]} x {height[index]} pixels, but its image has "
                f"{images.width[index]} x {images.height[index]}: make the mask again at the size "
                "of the image"
            )

    def _report_black(self, scan: FolderScan) -> None:
        """Report the black masks; raise ValueError if there is no other one."""
        black = scan.is_black[self.rows].nonzero().flatten().tolist()
        if not black:
            return
        count, first = f"{len(black)} of {len(self.rows)}", printable(self._path(black[0]))
        if len(black) == len(self.rows):
            raise ValueError(
                f"{count} masks are black, such as {first}, so that the loss is 0 everywhere: make "
                "the masks white where the images are to be learned"
            )
        if os.environ.get("RANK", "0") == "0":
            names = ", ".join(printable(self._path(index)) for index in black[:LISTED])
            print(
                f"diffcore: {count} masks are black ({names}{', ...' * (len(black) > LISTED)}): "
                "their images have no loss and are not learned",
                file=sys.stderr,
            )

    def _path(self, index: int) -> Path:
        return self.folder / self.names[int(self.rows[index])]

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
        path = self._path(index)
        try:
            return crop_mask(read_content(path), crop, factor)
        except ValueError as error:
            raise ValueError(f"the mask {printable(path)} cannot be read: {error}") from None

    @property
    def content_hash(self) -> str:
        """Hash of the contents of all masks."""
        return hash_content(*(bytes(row).hex() for row in self.hashes.numpy()))


def _match(images: PackedTexts, names: PackedTexts, ending: str) -> Tensor:
    """(N,) index in `names` of the mask of each image, with a suffix of images; -1 without one."""
    row_of = {name: row for row, name in enumerate(names)}
    stems = (os.path.splitext(name)[0] + ending for name in images)
    paths = ([stem + suffix for suffix in (".png", *SUFFIXES)] for stem in stems)
    return torch.tensor(
        [next((row_of[path] for path in each if path in row_of), -1) for each in paths]
    )
