"""Folders of small images."""

from pathlib import Path

from PIL import Image

from diffcore.training.data.image_files import ImageFiles


def write(
    path: Path, colour: object = 255, mode: str = "L", size: tuple[int, int] = (8, 8)
) -> Path:
    """Write an image of one colour; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def paths(images: ImageFiles) -> list[str]:
    """Path of each image below the data folder."""
    return list(images.names)
