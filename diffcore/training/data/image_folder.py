"""Images of a folder as a data set, labelled by their sub-folders."""

from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffcore.io.extras import import_extra
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import DataSource

__all__ = ["Fit", "ImageFolder", "Unreadable"]

Fit = Literal["crop", "pad", "exact"]
Unreadable = Literal["refuse", "skip"]


class ImageFolder(DataSource):
    """Images of a folder, scaled to [-1, 1], with the index of the sub-folder as the label.

    Sub-folders are sorted by name. Without sub-folders every label is 0.

    Args:
        folder: folder that is searched for images, read by the "imagefolder" builder of datasets.
        size: height and width of x_0 in pixels.
        channels: RGB or L; every image is converted to it, and transparency is dropped.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        unreadable: refuse images that cannot be read, or skip them.

    Raises:
        ValueError: There are no images, or unreadable ones; the message counts and lists them.
    """

    def __init__(
        self,
        folder: str,
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        unreadable: Unreadable = "refuse",
    ) -> None:
        _check_choices(channels=(channels, ("RGB", "L")), fit=(fit, get_args(Fit)))
        _check_choices(unreadable=(unreadable, get_args(Unreadable)))
        if size < 1:
            raise ValueError(f"size is {size}, expected a positive number of pixels")
        self.size, self.channels, self.fit, self.flip = size, channels, fit, flip
        self.images = _readable(_load(Path(folder)), unreadable, folder)

    @property
    def classes(self) -> list[str]:
        """Names of the sub-folders; a label is an index into this list."""
        label = self.images.features.get("label")
        return list(label.names) if label else []

    @property
    def labels(self) -> list[int]:
        """Label of each image."""
        return list(self.images["label"]) if self.classes else [0] * len(self)

    @property
    def paths(self) -> list[Path]:
        """Path of each image."""
        return [Path(image["path"]) for image in self.images["image"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        pixels = np.array(self._fitted(_open(item["image"]).convert(self.channels)))
        x0 = torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1)
        return x0.float() / 127.5 - 1, item.get("label", 0)

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The item at a position of the run.

        Args:
            index: index of the image.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0 (C, size, size), mirrored for half of the positions if `flip` is set, and the label.
        """
        x0, label = self[index]
        return x0.flip(-1) if self.flip and is_mirrored(seed, position) else x0, label

    def _fitted(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        size = (self.size, self.size)
        if self.fit == "exact" and image.size != size:
            raise ValueError(
                f"an image is {image.size}, expected exactly {size}: use fit crop or pad"
            )
        fit = ImageOps.pad if self.fit == "pad" else ImageOps.fit
        return image if image.size == size else fit(image, size, Image.Resampling.LANCZOS)


def _load(folder: Path) -> Any:
    datasets = import_extra("datasets", "A folder of images as a data set")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: expected one with images, in sub-folders by class if they "
            "have one"
        )
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    files = sorted(
        str(path.resolve()) for path in folder.rglob("*") if path.suffix.lower() in suffixes
    )
    if not files:
        raise ValueError(
            f"{folder} holds no images: expected files ending in {', '.join(sorted(suffixes))}"
        )
    datasets.disable_progress_bars()
    # Without a list of files, datasets takes a folder or file called "test" for another split.
    images = datasets.load_dataset("imagefolder", data_files={"train": files}, split="train")
    return images.cast_column("image", datasets.Image(decode=False))


def _readable(images: Any, policy: str, folder: str) -> Any:
    """The images that can be read; raises ValueError if others are to be refused."""
    broken = {index for index, item in enumerate(images) if not _is_readable(item["image"])}
    if not broken:
        return images
    names = [Path(images[index]["image"]["path"]).name for index in sorted(broken)[:10]]
    listed = ", ".join([*names, "..."] if len(broken) > 10 else names)
    message = f"{folder} has {len(broken)} unreadable of {len(images)} images: {listed}"
    if policy == "refuse" or len(broken) == len(images):
        raise ValueError(f"{message}; repair or delete them, or set unreadable: skip")
    print(f"{message}; skipped")
    return images.select([index for index in range(len(images)) if index not in broken])


def _open(image: dict[str, Any]) -> Any:
    """The decoded image with 8 bits per channel."""
    from PIL import Image

    with Image.open(BytesIO(image["bytes"] or Path(image["path"]).read_bytes())) as opened:
        opened.load()
        if opened.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            return Image.fromarray((np.asarray(opened) / 257).round().astype(np.uint8))
        return opened.copy()


def _is_readable(image: dict[str, Any]) -> bool:
    try:
        _open(image)
    except Exception:  # Pillow raises many types of errors for a file that is not an image
        return False
    return True


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
