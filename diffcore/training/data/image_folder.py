"""Images of a folder as a data set, labelled by their sub-folders."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from diffcore.training.data.cache import hash_content
from diffcore.training.data.image_files import Fit, ImageFiles, Unreadable, printable
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import DataSource

__all__ = ["ImageFolder", "label_images"]


class ImageFolder(DataSource):
    """Images of a folder, scaled to [-1, 1], with the index of the sub-folder as the label.

    The label of an image is the index of the first folder below `folder` on its path, among these
    folders sorted by name. Images that are not in sub-folders have no label. The order is that of
    the paths, sorted by name. Files and folders whose names begin with a dot are left out, and
    links are followed. Images are turned upright by their EXIF orientation.

    Args:
        folder: folder that is searched for images.
        size: height and width of x_0 in pixels.
        channels: RGB or L; every image is converted to it. Transparency is dropped: a transparent
            pixel keeps its stored colour.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        unreadable: refuse images that cannot be read, or skip them.

    Raises:
        ValueError: There are no images, or unreadable ones; some images are in sub-folders and
            others are not; or the sub-folders are training and held-out images. The message
            contains the files and the remedy.
    """

    class_names: tuple[str, ...]
    labels: list[int]

    def __init__(
        self,
        folder: str,
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        unreadable: Unreadable = "refuse",
    ) -> None:
        self.flip = flip
        self.images = ImageFiles(Path(folder), size, channels, fit, unreadable)
        self.class_names, self.labels = label_images(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

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

    @property
    def content_hash(self) -> str:
        """Hash of the options, and of the names and contents of the images."""
        images = self.images
        names = [str(path.relative_to(images.folder)) for path in images.paths]
        options = (images.size, images.channels, images.fit, self.flip)
        return hash_content(*map(str, options), *self.class_names, *names, *images.hashes)


def label_images(images: ImageFiles) -> tuple[tuple[str, ...], list[int]]:
    """Label images by the first folder below the data folder on their paths.

    Args:
        images: images of the data folder.

    Returns:
        The names of the classes, and the label of each image; () and -1 without sub-folders.

    Raises:
        ValueError: Some images are in sub-folders, and others are not.
    """
    parts = {path: path.relative_to(images.folder).parts for path in images.found}
    loose = [path.name for path, names in parts.items() if len(names) == 1]
    if len(loose) == len(parts):
        return (), [-1] * len(images)
    if loose:
        raise ValueError(
            f"{printable(images.folder)} has {len(loose)} of {len(parts)} images beside its "
            f"sub-folders, such as {printable(loose[0])}: move each image into the sub-folder of "
            "its class, or all images out of sub-folders"
        )
    classes = sorted({names[0] for names in parts.values()})
    label = {name: index for index, name in enumerate(classes)}
    return tuple(classes), [label[parts[path][0]] for path in images.paths]
