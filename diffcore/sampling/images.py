"""Images of samples: conversion of x_0 to pixels and back, and grids of images with labels."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffcore.core.process import Process
from diffcore.io.files import write_file
from diffcore.io.images.reader import read_content, read_image

__all__ = [
    "check_image",
    "draw_grid",
    "draw_table",
    "enlarge",
    "is_image",
    "load_image",
    "save_image",
    "to_image",
    "to_pixels",
    "to_unit_range",
]

MARGIN = 4
SMALLEST = 40
"""Side in pixels to which smaller samples are enlarged, by a whole factor."""


def to_unit_range(x: Tensor, process: Process) -> Tensor:
    """(N, C, H, W) in [0, 1] of x_0 (N, C, H, W): the range of the process is scaled, values beyond
    it are clipped.
    """
    check_image(process)
    return ((x.float() - process.low) / (process.high - process.low)).clamp(0, 1)


def to_pixels(x: Tensor, process: Process) -> np.ndarray:
    """(N, H, W, C) bytes of x_0 (N, C, H, W): the range of the process becomes 0 .. 255, values
    beyond it are clipped.
    """
    return rearrange(
        (to_unit_range(x, process) * 255).round().byte().cpu().numpy(), "n c h w -> n h w c"
    )


def load_image(path: str | Path, process: Process) -> Tensor:
    """x_0 (C, H, W) of an image file, upright by its EXIF orientation: bytes 0 .. 255 become the
    range of the process. The inverse of `to_pixels`.

    Raises:
        ValueError: The file cannot be read, or has another size or number of channels than the
            process.
    """
    check_image(process)
    try:
        picture = read_image(read_content(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable image: {error}") from None
    array = np.atleast_3d(np.asarray(picture))
    channels, height, width = process.shape
    if picture.mode not in ("L", "RGB") or array.shape != (height, width, channels):
        raise ValueError(
            f"{path} is {picture.width} x {picture.height} of mode {picture.mode}, expected "
            f"{width} x {height} of mode "
            f"{'L' if channels == 1 else 'RGB'}: resize or convert it first"
        )
    share = torch.from_numpy(array.astype(np.float32)) / 255
    return rearrange(process.low + share * (process.high - process.low), "h w c -> c h w")


def is_image(process: Process) -> bool:
    """True if samples of the process are images of 1 or 3 channels."""
    return len(process.shape) == 3 and process.shape[0] in (1, 3)


def check_image(process: Process) -> None:
    """Raise ValueError if samples of the process are not images of 1 or 3 channels."""
    if not is_image(process):
        raise ValueError(
            f"samples of shape {process.shape} are not images of 1 or 3 channels: write "
            ".safetensors instead"
        )


def to_image(array: np.ndarray) -> Image.Image:
    """An image of (H, W, C) bytes."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def draw_grid(x: Tensor, process: Process, rows: Sequence[str], per_row: int) -> Image.Image:
    """An image with `per_row` samples in each row and the name of the row beside it; small samples
    are enlarged.

    Args:
        x: (N, C, H, W) samples, row after row; the last row may be shorter.
        process: process with the range of the samples.
        rows: name of each row.
        per_row: number of samples in a row.

    Returns:
        The image.
    """
    tiles = to_pixels(enlarge(x), process)
    height, width = (size + MARGIN for size in tiles.shape[1:3])
    font = ImageFont.load_default(size=18)
    left = MARGIN + max([0, *(int(font.getlength(name)) + 2 * MARGIN for name in rows if name)])
    sheet = Image.new("RGB", (left + per_row * width, MARGIN + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        draw.text(
            (MARGIN, MARGIN + row * height + (height - MARGIN) / 2),
            name,
            fill="black",
            font=font,
            anchor="lm",
        )
    for place, tile in enumerate(tiles):
        row, column = divmod(place, per_row)
        sheet.paste(to_image(tile), (left + column * width, MARGIN + row * height))
    return sheet


def draw_table(
    tiles: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    corner: str = "",
) -> Image.Image:
    """A table of pictures with the names of its rows at the left and of its columns above them.

    Args:
        tiles: pictures of each row; None leaves a cell empty.
        rows: name of each row.
        columns: name of each column.
        corner: text above the names of the rows, such as what the columns are.

    Returns:
        The image.
    """
    font = ImageFont.load_default(size=18)
    drawn = [tile for row in tiles for tile in row if tile is not None]
    left = 2 * MARGIN + max(int(font.getlength(name)) + 1 for name in (*rows, corner))
    width = MARGIN + max(
        *(tile.width for tile in drawn), *(int(font.getlength(name)) + 1 for name in columns)
    )
    height, top = MARGIN + max(24, *(tile.height for tile in drawn)), 24 + MARGIN
    sheet = Image.new("RGB", (left + len(columns) * width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, top / 2), corner, fill="gray", font=font, anchor="lm")
    for column, name in enumerate(columns):
        place = (left + column * width + (width - MARGIN) / 2, top / 2)
        draw.text(place, name, fill="black", font=font, anchor="mm")
    for row, name in enumerate(rows):
        place = (MARGIN, top + row * height + (height - MARGIN) / 2)
        draw.text(place, name, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(tiles[row]):
            if tile is not None:
                corner_of_tile = left + column * width + (width - MARGIN - tile.width) // 2
                sheet.paste(tile, (corner_of_tile, top + row * height))
    return sheet


def enlarge(x: Tensor) -> Tensor:
    """Repeat each pixel k times along both axes, so that small images can be seen.

    Args:
        x: (N, C, H, W) images.

    Returns:
        (N, C, k H, k W) images, where k is the largest factor with sides up to 40 pixels, at least
        1.
    """
    factor = max(1, SMALLEST // max(x.shape[2:]))
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def save_image(picture: Image.Image, path: str | Path) -> None:
    """Write an image atomically; the folder is created."""
    path, content = Path(path), BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(content, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    write_file(path, content.getvalue())
