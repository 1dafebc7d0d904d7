"""The image files of a folder, and their pixels as x_0 of one size."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from diffcore.io.images.crop import Crop
from diffcore.io.images.pixels import Fit, as_pixels, check_options, crop_pixels
from diffcore.io.images.reader import read_content
from diffcore.training.data.listing import PackedTexts, printable
from diffcore.training.data.scan import SUFFIXES, FolderScan, scan_folder

__all__ = ["MASK", "Fit", "ImageFiles", "Unreadable"]

MASK = ".mask."
"""What the name of a mask beside an image contains: such a file is not an image of the data."""

Unreadable = Literal["refuse", "skip"]

TRAINING = {"train", "training"}
HELD_OUT = {"dev", "eval", "test", "testing", "val", "valid", "validation"}
LISTED = 3
"""Number of unreadable images that a message lists."""


class ImageFiles:
    """The images of a folder and its sub-folders, sorted by path, as x_0 of one size.

    Every image is decoded once, when the folder is scanned for the first time, so that a damaged
    one is found before the run. The scan is recorded, see `scan_folder`.

    Args:
        folder: folder that is searched for images.
        size: height and width of x_0 in pixels.
        channels: RGB or L.
        fit: crop, pad or exact, see `ImageFolder`.
        unreadable: refuse images that cannot be read, or skip them.
        verify: True compares the hash of every file with the recorded scan.

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
        verify: bool = False,
    ) -> None:
        check_options(size, channels, fit)
        if unreadable not in get_args(Unreadable):
            raise ValueError(
                f"unreadable is {unreadable!r}, expected one of {', '.join(get_args(Unreadable))}"
            )
        self.folder, self.size, self.channels, self.fit = Path(folder), size, channels, fit
        self.scan = scan = scan_folder(self.folder, verify)
        self.found = scan.files.names
        """Path of each image below the folder, with those that are skipped."""
        _check_found(self.folder, self.found)
        _check_readable(self.folder, scan, unreadable)
        if fit == "exact":
            self._check_sizes(scan)
        is_image = [MASK not in name for name in self.found]
        rows = scan.readable[torch.tensor(is_image)[scan.readable]]
        is_whole = len(rows) == len(scan)
        self.names = self.found if is_whole else _select(self.found, rows)
        """Path of each image that can be read, below the folder."""
        self.hashes = scan.sha256[rows]
        """(N, 32) SHA-256 of each file in `names`."""
        self.width, self.height = scan.width[rows], scan.height[rows]
        """(N,) columns and rows of each upright image in `names`."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """x_0 (C, size, size) in [-1, 1] of an image.

        Raises:
            ValueError: The file can no longer be read; the message contains its path.
        """
        return self._read(index, lambda content: as_pixels(content, *self._options))

    def read(self, index: int, crop: Crop) -> Tensor:
        """Read an image, cropped or padded by `fit`, and mirrored.

        Args:
            index: index of the image in `names`.
            crop: crop of the image; of an image that is not cropped only `is_mirrored` is used.

        Returns:
            x_0 (C, H, W) in [-1, 1].

        Raises:
            ValueError: The file can no longer be read; the message contains its path.
        """
        if self.fit == "crop":
            return self._read(index, lambda content: crop_pixels(content, self.channels, crop))
        return self[index].flip(-1) if crop.is_mirrored else self[index]

    @property
    def _options(self) -> tuple[int, str, Fit]:
        return self.size, self.channels, self.fit

    def _read(self, index: int, decode: Callable[[bytes], Tensor]) -> Tensor:
        path = self.folder / self.names[index]
        try:
            return decode(read_content(path))
        except ValueError as error:
            raise ValueError(f"{printable(path)} cannot be read: {error}") from None

    def _check_sizes(self, scan: FolderScan) -> None:
        """Raise ValueError if an image that can be read has another size."""
        is_other = (scan.width != self.size) | (scan.height != self.size)
        for row in (is_other & (scan.width > 0)).nonzero().flatten().tolist()[:1]:
            path = self.folder / scan.files.names[row]
            raise ValueError(
                f"{printable(path)} has {scan.width[row]} x {scan.height[row]} pixels, expected "
                f"exactly {self.size} x {self.size}: resize it, or use fit crop or pad"
            )


def _select(names: PackedTexts, rows: Tensor) -> PackedTexts:
    return PackedTexts.pack(names[row] for row in rows.tolist())


def _check_found(folder: Path, names: PackedTexts) -> None:
    """Raise ValueError if there are no images, or training and held-out images."""
    if not names:
        raise ValueError(
            f"{printable(folder)} holds no images: expected files ending in {', '.join(SUFFIXES)}, "
            "whose names do not begin with a dot"
        )
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = [[top for top in tops if top.lower() in split] for split in (TRAINING, HELD_OUT)]
    if all(splits):
        (training, *_), (held_out, *_) = splits
        raise ValueError(
            f"{printable(folder)} has the sub-folders {training} and {held_out}, so that held-out "
            f"images would be trained on: set folder to {printable(folder / training)}"
        )


def _check_readable(folder: Path, scan: FolderScan, policy: Unreadable) -> None:
    """Raise ValueError, or print a message, if there are unreadable images."""
    if not scan.reasons:
        return
    listed = [
        f"{printable(Path(scan.files.names[row]).name)} ({scan.reasons[row]})"
        for row in sorted(scan.reasons)[:LISTED]
    ]
    more = ["..."] if len(scan.reasons) > LISTED else []
    message = (
        f"{printable(folder)} has {len(scan.reasons)} unreadable of {len(scan)} images: "
        f"{', '.join(listed + more)}"
    )
    if policy == "refuse" or len(scan.reasons) == len(scan):
        raise ValueError(f"{message}; repair or delete them, or set unreadable: skip")
    print(f"{message}; skipped")
