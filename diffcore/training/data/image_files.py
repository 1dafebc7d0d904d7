"""The image files of a folder, and their pixels as x_0 of one size."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffcore.io.image_reader import read_content, read_image

__all__ = ["Fit", "ImageFiles", "Unreadable", "find_files", "printable"]

Fit = Literal["crop", "pad", "exact"]
Unreadable = Literal["refuse", "skip"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TRAINING = {"train", "training"}
HELD_OUT = {"dev", "eval", "test", "testing", "val", "valid", "validation"}
LISTED = 3
"""Number of unreadable images that a message lists."""


class ImageFiles:
    """The images of a folder and its sub-folders, sorted by path, as x_0 of one size.

    Every image is decoded once at the start, so that a damaged one is found before the run.

    Args:
        folder: folder that is searched for images.
        size: height and width of x_0 in pixels.
        channels: RGB or L.
        fit: crop, pad or exact, see `ImageFolder`.
        unreadable: refuse images that cannot be read, or skip them.

    Raises:
        ValueError: There are no images, some cannot be read or have another size than `fit: exact`
            requires, or the folder contains training and held-out images.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        channels: str,
        fit: Fit,
        unreadable: Unreadable,
    ) -> None:
        _check_choices(channels=(channels, ("RGB", "L")), fit=(fit, get_args(Fit)))
        _check_choices(unreadable=(unreadable, get_args(Unreadable)))
        if size < 1:
            raise ValueError(f"size is {size}, expected a positive number of pixels")
        self.folder, self.size, self.channels, self.fit = Path(folder), size, channels, fit
        self.found = _find_images(self.folder)
        """Path of each image, with those that are skipped."""
        self.paths: list[Path] = []
        """Path of each image that can be read."""
        self.hashes: list[str] = []
        """SHA-256 of each file in `paths`."""
        self._read_all(unreadable)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """x_0 (C, size, size) in [-1, 1] of an image.

        Raises:
            ValueError: The file can no longer be read; the message contains its path.
        """
        path = self.paths[index]
        try:
            image = self._decode(read_content(path))
        except ValueError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error}") from None
        pixels = np.array(self._fitted(image, path))
        x0 = torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1)
        return x0.float() / 127.5 - 1

    def _read_all(self, policy: Unreadable) -> None:
        """Fill `paths` and `hashes`; raise ValueError if an image is to be refused."""
        reasons: dict[Path, str] = {}
        for path in self.found:
            try:
                content = read_content(path)
                image = self._decode(content)
            except ValueError as error:
                reasons[path] = str(error)
                continue
            self._check_size(image, path)
            self.paths.append(path)
            self.hashes.append(hashlib.sha256(content).hexdigest())
        if not reasons:
            return
        listed = [f"{printable(path.name)} ({reason})" for path, reason in reasons.items()]
        more = ["..."] if len(listed) > LISTED else []
        message = (
            f"{printable(self.folder)} has {len(reasons)} unreadable of {len(self.found)} images: "
            f"{', '.join(listed[:LISTED] + more)}"
        )
        if policy == "refuse" or not self.paths:
            raise ValueError(f"{message}; repair or delete them, or set unreadable: skip")
        print(f"{message}; skipped")

    def _decode(self, content: bytes) -> Image.Image:
        # A pixel keeps its stored colour, however transparent it is.
        return read_image(content).convert(self.channels)

    def _check_size(self, image: Image.Image, path: Path) -> None:
        if self.fit == "exact" and image.size != (self.size, self.size):
            raise ValueError(
                f"{printable(path)} has {image.width} x {image.height} pixels, expected exactly "
                f"{self.size} x {self.size}: resize it, or use fit crop or pad"
            )

    def _fitted(self, image: Image.Image, path: Path) -> Image.Image:
        self._check_size(image, path)
        size = (self.size, self.size)
        fit = ImageOps.pad if self.fit == "pad" else ImageOps.fit
        return image if image.size == size else fit(image, size, Image.Resampling.LANCZOS)


def find_files(folder: str | Path) -> list[Path]:
    """List the files of a folder and its sub-folders, sorted by path.

    A link to a file or folder is followed, and keeps its own name. A file or folder whose name
    begins with a dot is left out.

    Args:
        folder: folder to list.

    Returns:
        The paths, which begin with `folder`. They may include devices and broken links.

    Raises:
        ValueError: It is not a folder, or a link in it leads to a folder that contains the link.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{printable(folder)} is not a folder: expected one with images, in sub-folders by "
            "class if they have one"
        )
    return sorted(_walk(folder, ()), key=str)


def printable(path: Path | str) -> str:
    """A path as text for messages (one line); bytes that are not UTF-8 are escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _walk(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    parents = (*parents, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() in parents:
            raise ValueError(
                f"{printable(path)} is a link to a folder that contains it: remove the link"
            )
        else:
            yield from _walk(path, parents)


def _find_images(folder: Path) -> list[Path]:
    images = [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES]
    if not images:
        raise ValueError(
            f"{printable(folder)} holds no images: expected files ending in {', '.join(SUFFIXES)}, "
            "whose names do not begin with a dot"
        )
    names = sorted({path.relative_to(folder).parts[0] for path in images})
    splits = [[name for name in names if name.lower() in split] for split in (TRAINING, HELD_OUT)]
    if all(splits):
        (training, *_), (held_out, *_) = splits
        raise ValueError(
            f"{printable(folder)} has the sub-folders {training} and {held_out}, so that held-out "
            f"images would be trained on: set folder to {printable(folder / training)}"
        )
    return images


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
