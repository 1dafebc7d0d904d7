"""Sixty images of mixed sizes, modes and formats, whose colours are their coordinates."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 40), (64, 40), (40, 64), (90, 48), (48, 90), (120, 45), (33, 50), (80, 80))
"""(width, height) of the upright images."""
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "I;16", "LA", "1", "EXIF", "GIF")
STEP = 2
"""Grey values of a ramp per pixel."""


def ramp(width: int, height: int) -> Image.Image:
    """An RGB image whose red is 2 x and whose green is 2 y, in pixels; blue is 128."""
    x, y = np.meshgrid(np.arange(width) * STEP, np.arange(height) * STEP)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


def write_mixed_images(folder: Path, count: int = 60) -> list[tuple[Path, str, tuple[int, int]]]:
    """Write images; every fourth has a sub-folder of its own name as its place.

    Returns:
        Path, kind and upright size of each image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(count):
        kind, size = MODES[number % len(MODES)], SIZES[number * 7 % len(SIZES)]
        path = folder / f"{number:02d}"
        written.append((_write(path, ramp(*size), kind), kind, size))
    return written


def _write(path: Path, image: Image.Image, kind: str) -> Path:
    match kind:
        case "EXIF":  # stored turned by 90 degrees, shown upright
            exif = Image.Exif()
            exif[0x0112] = 6
            path = path.with_suffix(".png")
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        case "CMYK":
            path = path.with_suffix(".tif")
            image.convert("CMYK").save(path)
        case "I;16":
            path = path.with_suffix(".png")
            grey = np.asarray(image)[..., 0].astype(np.uint16) * 257
            Image.fromarray(grey).save(path)
        case "GIF":
            path = path.with_suffix(".gif")
            image.quantize(256).save(path)
        case "P":
            path = path.with_suffix(".png")
            image.quantize(256).save(path)
        case "RGBA" | "LA":
            path = path.with_suffix(".png")
            layered = image.convert(kind)
            layered.putalpha(Image.fromarray(np.asarray(image)[..., 0]))
            layered.save(path)
        case _:
            path = path.with_suffix(".png")
            image.convert(kind).save(path)
    return path
