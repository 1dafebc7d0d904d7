"""Images of a folder as a data set, labelled by their sub-folders."""

from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffcore.core.random import Stream, uniform
from diffcore.io.images.crop import CENTRE, Crop
from diffcore.training.data.buckets.items import ImageItems
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.cache import hash_content
from diffcore.training.data.conditioned.image_pairs import ConditionFolder, ImagePairs
from diffcore.training.data.image_files import Fit, ImageFiles, Unreadable
from diffcore.training.data.listing import printable
from diffcore.training.data.masks import MaskFiles
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import WEIGHT, DataSource

__all__ = ["CropPosition", "ImageFolder", "label_images"]

CropPosition = Literal["center", "random"]


class ImageFolder(DataSource):
    """Images of a folder, scaled to [-1, 1], with the index of the sub-folder as the label.

    The label of an image is the index of the first folder below `folder` on its path, among these
    folders sorted by name. Images that are not in sub-folders have no label. The order is that of
    the paths, sorted by name. Files and folders whose names begin with a dot are left out, and
    links are followed. Images are turned upright by their EXIF orientation. Every image is decoded
    once, when the folder is scanned for the first time; `diffcore.training.data.scan` records the
    result.

    Args:
        folder: folder that is searched for images.
        size: height and width of x_0 in pixels.
        channels: RGB or L; every image is converted to it. Transparency is dropped: a transparent
            pixel keeps its stored colour.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        buckets: sizes of several aspect ratios, each image at the one closest to its own; every
            batch is of one size, and `size` is that of previews. None: squares of `size`.
        crop: center, or random (keyed by the position in the run): the part of an image that is
            kept along the side that is cut, with `fit: crop`.
        masks: place of the masks: beside (cats/1.mask.png is the mask of cats/1.png), or a folder
            of masks with the paths of the images. White pixels have a weight of 1 in the loss,
            black ones of 0. "": no masks.
        conditions: name of each condition of the process that is an image -> its folder, with the
            paths of the images and any suffix, and its channels. None: no conditions.
        unreadable: refuse images that cannot be read, or skip them.
        verify: true reads every file at the start, and compares its hash with the recorded scan;
            false compares size and time.

    Raises:
        ValueError: There are no images, or unreadable ones; some images are in sub-folders and
            others are not; or the sub-folders are training and held-out images. The message
            contains the files and the remedy.
    """

    class_names: tuple[str, ...]
    labels: Tensor

    def __init__(
        self,
        folder: str,
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        unreadable: Unreadable = "refuse",
        verify: bool = False,
        buckets: Buckets | None = None,
        crop: CropPosition = "center",
        masks: str = "",
        conditions: dict[str, ConditionFolder] | None = None,
    ) -> None:
        self.flip, self.crop = flip, crop
        self.images = ImageFiles(Path(folder), size, channels, fit, unreadable, verify)
        if crop not in get_args(CropPosition) or (crop == "random" and fit != "crop"):
            raise ValueError(f"crop is {crop!r}, expected center, or random with fit: crop")
        self.items = ImageItems(self.images, buckets)
        self.groups = self.items.groups(len(channels))  # "RGB", "L"
        self.masks = MaskFiles(self.images, masks, verify) if masks else None
        self.has_masks = self.masks is not None
        self.conditions = ImagePairs(self.images, conditions or {}, verify)
        self.class_names, labels = label_images(self.images)
        self.labels = labels[self.items.image]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._read(index, self.items.crop(index))

    def _read(self, index: int, crop: Crop) -> tuple[Any, ...]:
        item = self.items.read(index, crop), int(self.labels[index])
        image = int(self.items.image[index])
        extras = self.conditions.read(image, crop)
        if self.masks is not None:
            extras[WEIGHT] = self.masks.read(image, crop)
        return (*item, extras) if extras else item

    def item(self, index: int, seed: int, position: int) -> tuple[Any, ...]:
        """The item at a position of the run.

        Args:
            index: index of the item.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0 (C, H, W), cropped and mirrored by the position as set, the label, and the extras:
            the conditions by name, and with masks `weight` (1, H, W).
        """
        offset = float(uniform(seed, Stream.CROP, position)) if self.crop == "random" else CENTRE
        is_flipped = self.flip and is_mirrored(seed, position)
        return self._read(index, self.items.crop(index, offset, is_flipped))

    @property
    def content_hash(self) -> str:
        """Hash of the options, and of the names and contents of the images."""
        images = self.images
        options = (images.size, images.channels, images.fit, self.flip)
        contents = sha256(images.hashes.numpy().tobytes()).hexdigest()
        further: list[str] = [self.crop] if self.crop != "center" else []
        further += [part.content_hash for part in (self.groups, self.masks) if part is not None]
        further += filter(None, [self.conditions.content_hash])
        return hash_content(
            *map(str, options), *self.class_names, images.names.sha256, contents, *further
        )


def label_images(images: ImageFiles) -> tuple[tuple[str, ...], Tensor]:
    """Label images by the first folder below the data folder on their paths.

    Args:
        images: images of the data folder.

    Returns:
        The names of the classes, and the label (N,) of each image; () and -1 without sub-folders.

    Raises:
        ValueError: Some images are in sub-folders, and others are not.
    """
    loose = [name for name in images.found if "/" not in name]
    if len(loose) == len(images.found):
        return (), torch.full((len(images),), -1)
    if loose:
        raise ValueError(
            f"{printable(images.folder)} has {len(loose)} of {len(images.found)} images beside its "
            f"sub-folders, such as {printable(loose[0])}: move each image into the sub-folder of "
            "its class, or all images out of sub-folders"
        )
    classes = sorted({name.partition("/")[0] for name in images.found})
    label = {name: index for index, name in enumerate(classes)}
    return tuple(classes), torch.tensor([label[name.partition("/")[0]] for name in images.names])
