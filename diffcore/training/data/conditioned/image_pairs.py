"""Conditions that are images of a folder, one beside each image of the data.

images/cats/1.png, depth/cats/1.webp       with any suffix of an image
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

from diffcore.io.images.crop import Crop
from diffcore.training.data.cache import hash_content
from diffcore.training.data.image_files import ImageFiles
from diffcore.training.data.listing import printable

__all__ = ["ConditionFolder", "ImagePairs"]


@dataclass(frozen=True)
class ConditionFolder:
    """A folder with the condition of each image, such as its depth or its edges.

    Args:
        folder: folder of images with the paths of the images of the data, and any suffix.
        channels: RGB or L; every condition is converted to it.
    """

    folder: str
    channels: Literal["RGB", "L"] = "RGB"


class ImagePairs:
    """The condition images of each image of a data folder, by the name of the condition.

    A condition is turned upright, and cropped or padded and mirrored exactly as its image.

    Args:
        images: images of the data folder.
        folders: name of each condition -> its folder.
        verify: True compares the hash of every file with the recorded scan.

    Raises:
        ValueError: An image has no condition, several, or one of another size; or a folder is
            inside that of the images.
    """

    def __init__(
        self,
        images: ImageFiles,
        folders: Mapping[str, ConditionFolder],
        verify: bool = False,
    ) -> None:
        self.pairs = {name: _Pair(images, name, spec, verify) for name, spec in folders.items()}

    def read(self, index: int, crop: Crop) -> dict[str, Tensor]:
        """The conditions of an image.

        Args:
            index: index of the image.
            crop: crop of the image.

        Returns:
            Name -> (C, H, W) in [-1, 1], of the size of the cropped image in pixels.

        Raises:
            ValueError: A file can no longer be read, or has another size than its image.
        """
        return {name: pair.read(index, crop) for name, pair in self.pairs.items()}

    @property
    def content_hash(self) -> str:
        """Hash of the names, channels and contents of the conditions; "" without conditions."""
        hashes = [text for name, pair in self.pairs.items() for text in (name, pair.content_hash)]
        return hash_content(*hashes) if hashes else ""


class _Pair:
    """The images of one condition, in the order of the images of the data."""

    def __init__(self, images: ImageFiles, name: str, spec: ConditionFolder, verify: bool) -> None:
        _check_folder(images, name, spec)
        self.files = ImageFiles(
            spec.folder, images.size, spec.channels, images.fit, "refuse", verify
        )
        self.rows = _match(images, self.files, name)
        _check_sizes(images, self.files, self.rows)

    def read(self, index: int, crop: Crop) -> Tensor:
        return self.files.read(int(self.rows[index]), crop)

    @property
    def content_hash(self) -> str:
        contents = self.files.hashes[self.rows].numpy().tobytes()
        return hash_content(self.files.channels, sha256(contents).hexdigest())


def _check_folder(images: ImageFiles, name: str, spec: ConditionFolder) -> None:
    """Raise ValueError if the conditions are among the images of the data."""
    own, data = os.path.realpath(spec.folder), os.path.realpath(images.folder)
    if own != data and os.path.commonpath((own, data)) == data:
        raise ValueError(
            f"the folder of the condition {name}, {printable(spec.folder)}, is inside that of the "
            f"images, {printable(images.folder)}, and would be trained on: move it out"
        )


def _match(images: ImageFiles, files: ImageFiles, name: str) -> Tensor:
    """(N,) index in `files` of the condition of each image."""
    row_of: dict[str, int] = {}
    for row, path in enumerate(files.names):
        stem = os.path.splitext(path)[0]
        if stem in row_of:
            raise ValueError(
                f"{printable(files.folder)} has two conditions {name} of one image, "
                f"{printable(files.names[row_of[stem]])} and {printable(path)}: remove one of them"
            )
        row_of[stem] = row
    rows = [row_of.get(os.path.splitext(path)[0], -1) for path in images.names]
    missing = [path for path, row in zip(images.names, rows, strict=True) if row < 0]
    if missing:
        stem = os.path.splitext(missing[0])[0]
        raise ValueError(
            f"{len(missing)} of {len(images)} images have no condition {name}, such as "
            f"{printable(missing[0])}: expected {printable(files.folder / stem)} with the suffix "
            "of an image"
        )
    return torch.tensor(rows)


def _check_sizes(images: ImageFiles, files: ImageFiles, rows: Tensor) -> None:
    """Raise ValueError if a condition has another upright size than its image."""
    is_other = (files.width[rows] != images.width) | (files.height[rows] != images.height)
    for index in is_other.nonzero().flatten().tolist()[:1]:
        row = int(rows[index])
        raise ValueError(
            f"{int(is_other.sum())} of {len(images)} conditions have another size than their "
            f"images, such as {printable(files.folder / files.names[row])}: it has "
            f"{files.width[row]} x {files.height[row]} pixels, expected {images.width[index]} x "
            f"{images.height[index]}, both upright by their EXIF orientation"
        )
