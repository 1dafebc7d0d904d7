"""Image files as a viewer shows them: upright, with 8 bits per channel."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["FORMATS", "read_content", "read_image"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are decoded. Pillow passes others, such as EPS, to an external program."""


def read_content(path: str | Path) -> bytes:
    """Content of a regular file.

    Args:
        path: file to read.

    Returns:
        Its bytes.

    Raises:
        ValueError: The file cannot be read; the message is the reason, to be preceded by its name.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError("it is a broken link" if path.is_symlink() else "it does not exist")
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("it is not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from None


def read_image(content: bytes) -> Image.Image:
    """Decode an image file.

    The EXIF orientation is applied. Grey values of 16 bits are scaled to 8 bits: 65535 becomes 255.
    Only the first frame of an animation is read.

    Args:
        content: bytes of the file, in a format of `FORMATS`, whatever its name.

    Returns:
        The image, in the mode of the file.

    Raises:
        ValueError: The file is damaged, too large for Pillow, no image, or it has 32 bits per
            channel; the message is the reason, to be preceded by the name of the file.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise ValueError("it is no image of a known format") from None
    except Exception as error:  # Pillow raises many types of errors for a damaged file
        raise ValueError(str(error) or type(error).__name__) from None
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        raise ValueError(
            f"its values of 32 bits from {low} to {high} have no known range, expected 8 or 16 "
            "bits per channel: convert it first"
        )
    return image
