"""What data sets of encoded images share: options, decoding, labels and captions."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore.io.images.pixels import Fit, as_pixels, check_options
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import DataSource

__all__ = ["ImageCollection", "ImageOptions", "as_classes", "as_label", "check_condition"]


class ImageOptions:
    """How encoded images become x_0.

    Args:
        size: height and width of x_0 in pixels.
        channels: RGB or L, to which the images are converted.
        fit: crop, pad or exact, see `as_pixels`.
        flip: True mirrors half of the images, keyed by the position in the run.

    Raises:
        ValueError: A choice is unknown, or the size is not positive.
    """

    def __init__(self, size: int, channels: Literal["RGB", "L"], fit: Fit, flip: bool) -> None:
        check_options(size, channels, fit)
        self.size, self.channels, self.fit, self.flip = size, channels, fit, flip

    def decode(self, content: bytes, name: str) -> Tensor:
        """Decode an image.

        Args:
            content: bytes of the image file.
            name: name of the image, for messages.

        Returns:
            x_0 (C, size, size) in [-1, 1].

        Raises:
            ValueError: It cannot be decoded, or has another size than `fit: exact` requires.
        """
        try:
            return as_pixels(content, self.size, self.channels, self.fit)
        except ValueError as error:
            raise ValueError(f"{name} cannot be read: {error}") from None

    def mirror(self, x0: Tensor, seed: int, position: int) -> Tensor:
        """x_0, mirrored for half of the positions of a run if `flip` is set.

        Args:
            x0: (C, H, W) image.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            (C, H, W) image.
        """
        return x0.flip(-1) if self.flip and is_mirrored(seed, position) else x0

    def __str__(self) -> str:
        return f"{self.size} {self.channels} {self.fit} {self.flip}"


class ImageCollection(DataSource):
    """A map-style data set of encoded images; a subclass reads their bytes.

    Args:
        options: how the images become x_0.
        labels: (N,) label of each image; -1 without labels.
        class_names: names of the classes, or None if they are unknown.
        texts: captions that the labels index; () without captions.
    """

    labels: Tensor

    def __init__(
        self,
        options: ImageOptions,
        labels: Tensor,
        class_names: tuple[str, ...] | None,
        texts: tuple[str, ...],
    ) -> None:
        self.options, self.labels = options, labels
        self.class_names, self.texts = class_names, texts

    def _read(self, index: int) -> tuple[bytes, str]:
        """Read an encoded image.

        Args:
            index: index of the image.

        Returns:
            Its bytes, and its name for messages.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = range(len(self))[index]
        return self.options.decode(*self._read(row)), int(self.labels[row])

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The image at a position of the run, mirrored for half of them if `flip` is set.

        Args:
            index: index of the image.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            x_0 (C, size, size) and the label.
        """
        x0, label = self[index]
        return self.options.mirror(x0, seed, position), label


def check_condition(label: str, caption: str) -> None:
    """Check that images have one condition at most.

    Args:
        label: name of the labels; "" for none.
        caption: name of the captions; "" for none.

    Raises:
        ValueError: Both are set.
    """
    if label and caption:
        raise ValueError(
            f"label is {label!r} and caption {caption!r}, but an image has one condition: set "
            "label to '' to train on captions"
        )


def as_label(value: Any, name: str) -> int:
    """An integer label.

    Args:
        value: an integer, or text with one.
        name: name of the sample, for messages.

    Returns:
        The label.

    Raises:
        ValueError: It is no integer.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        return int(value)
    raise ValueError(f"{name} has the label {str(value)[:40]!a}, expected an integer")


def as_classes(texts: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Number distinct texts, such as captions or names of classes, in their sorted order.

    Args:
        texts: text of each item.

    Returns:
        The distinct texts, and (N,) index of each item into them.
    """
    names = tuple(sorted(set(texts)))
    index = {name: row for row, name in enumerate(names)}
    return names, torch.tensor([index[text] for text in texts], dtype=torch.int64)
