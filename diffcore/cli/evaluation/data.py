"""Data that a command line names: a folder, a run, a file of arrays, or a data set."""

from pathlib import Path
from typing import Literal

import yaml
from torch.utils.data import Dataset

from diffcore.core.process import Process
from diffcore.evaluation.features.image_set import SourceImages
from diffcore.io.parser import ComponentParser, SpecError
from diffcore.run import Run
from diffcore.sampling.images import is_image
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.arrays import Arrays, Tensors
from diffcore.training.data.image_folder import ImageFolder
from diffcore.training.data.scan import scan_folder
from diffcore.training.data.source import DataSource

__all__ = ["is_run", "read_images", "read_source"]


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a training run."""
    return (Path(folder) / "config.yaml").is_file()


def read_source(text: str, process: Process | None = None, size: int = 0) -> DataSource:
    """The data set that a text names.

    Args:
        text: folder of images, folder of a run (its data), .npy or .safetensors file, the name of
            a data set such as Digits, or its class and options in one line of YAML.
        process: process of the model, which gives the size and channels of the images of a folder.
        size: height and width of the images of a folder; 0: those of `process`, or of the first
            image.

    Returns:
        The data set.

    Raises:
        ValueError: the text names no data set.
    """
    path = Path(text)
    if path.is_dir() and is_run(path):
        return _component(Run(path).settings().get("data"), str(path))
    if path.is_dir():
        return _folder(path, process, size)
    if path.suffix == ".npy":
        return Arrays(text)
    if path.suffix == ".safetensors":
        return Tensors(text)
    return _component(_parse(text), text)


def read_images(text: str, process: Process | None = None, size: int = 0) -> SourceImages:
    """The images that a text names.

    Args:
        text: name of the data, see `read_source`.
        process: process of the images to compare with: their size, channels and range.
        size: height and width of the images of a folder; 0: those of `process`, or of the first
            image.

    Returns:
        The images.

    Raises:
        ValueError: the text names no images, or they do not fit `process`.
    """
    images = SourceImages(read_source(text, process, size), *_range(Path(text), process), text)
    if process is not None and images.shape != process.shape:
        raise ValueError(
            f"{text} has images of shape {images.shape}, expected {process.shape}, the shape of "
            "the images to compare with"
        )
    return images


def _range(path: Path, process: Process | None) -> tuple[float, float]:
    """The values of black and white of the images that a path names."""
    if not path.is_dir():
        return (-1.0, 1.0) if process is None else (process.low, process.high)
    own = Process.load(Run(path).process) if is_run(path) else None
    return (-1.0, 1.0) if own is None or not is_image(own) else (own.low, own.high)


def _parse(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _component(spec: object, text: str) -> DataSource:
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--data", type=Dataset)
    try:
        settings = parser.parse_object({"data": spec})
    except SpecError as error:
        # Of a plain word the parser knows only that it is no class, and proposes unlike ones.
        reason = f" ({error})" if isinstance(spec, dict) else ": there is nothing of this name"
        raise ValueError(
            f"{text} names no data{reason}; expected a folder, a run, a .npy or .safetensors file, "
            "a data set such as Digits, or its class and options, such as "
            "'{class_path: Digits, init_args: {split: test}}'"
        ) from None
    return as_data_source(parser.instantiate(settings).data)


def _folder(path: Path, process: Process | None, size: int) -> ImageFolder:
    """The images of a folder at the size of the process, or at that of its first image."""
    if process is not None:
        channels, height, width = process.shape
        if height != width:
            raise ValueError(
                f"images are {width} x {height}, expected squares to compare with a folder: name "
                "a .npy file of images of this size"
            )
        return ImageFolder(str(path), height, _mode(channels == 1), unreadable="skip")
    scan = scan_folder(path)
    rows = scan.readable
    if not len(rows):
        return ImageFolder(str(path), 1)  # raises
    side = size or int(scan.width[rows[0]].minimum(scan.height[rows[0]]))
    is_grey = bool(scan.is_grey[rows].all())
    return ImageFolder(str(path), side, _mode(is_grey), "crop" if size else "exact")


def _mode(is_grey: bool) -> Literal["L", "RGB"]:
    return "L" if is_grey else "RGB"
