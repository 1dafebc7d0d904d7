"""Pictures of samples: x_0 to pixels, and grids of them with their labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffcore.core.process import Process

MARGIN = 4


def unit(x: Tensor, process: Process) -> Tensor:
    """x_0 of shape (N, C, H, W) within [0, 1]: the process's range, and values beyond it are cut."""
    check(process)
    return ((x.float() - process.low) / (process.high - process.low)).clamp(0, 1)


def pixels(x: Tensor, process: Process) -> np.ndarray:
    """(N, H, W, C) bytes of x_0 of shape (N, C, H, W); the process's range becomes 0 .. 255, values beyond it are cut."""
    return rearrange((unit(x, process) * 255).round().byte().cpu().numpy(), "n c h w -> n h w c")


def load(path: Path, process: Process) -> Tensor:
    """x_0 of a picture, of the process's shape: bytes 0 .. 255 become its range. The inverse of `pixels`.

    Raises:
        ValueError: it cannot be read, or has another size or number of channels than the process.
    """
    check(process)
    try:
        picture = Image.open(path)
        array = np.atleast_3d(np.asarray(picture))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from None
    channels, height, width = process.shape
    if picture.mode not in ("L", "RGB") or array.shape != (height, width, channels):
        raise ValueError(
            f"{path} is {picture.width} x {picture.height} of mode {picture.mode}, expected {width} x {height} of mode "
            f"{'L' if channels == 1 else 'RGB'}: resize or convert it first"
        )
    share = torch.from_numpy(array.astype(np.float32)) / 255
    return rearrange(process.low + share * (process.high - process.low), "h w c -> c h w")


def drawable(process: Process) -> bool:
    """Whether samples are images of 1 or 3 channels."""
    return len(process.shape) == 3 and process.shape[0] in (1, 3)


def check(process: Process) -> None:
    """Raise where samples are not images."""
    if not drawable(process):
        raise ValueError(
            f"samples of shape {process.shape} are not images of 1 or 3 channels: write .safetensors instead"
        )


def image(array: np.ndarray) -> Image.Image:
    """A picture of (H, W, C) bytes."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(x: Tensor, process: Process, rows: Sequence[str], per_row: int) -> Image.Image:
    """A picture with `per_row` samples in each row and the row's name beside it; small samples are enlarged.

    Args:
        x: (N, C, H, W), row after row; the last row may be shorter.
        process: for the range.
        rows: the name of each row.
        per_row: samples in a row.
    """
    tiles = pixels(x, process)
    factor = max(1, 40 // max(tiles.shape[1:3]))
    height, width = (size * factor + MARGIN for size in tiles.shape[1:3])
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
        enlarged = image(tile.repeat(factor, 0).repeat(factor, 1))
        sheet.paste(enlarged, (left + column * width, MARGIN + row * height))
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    picture.save(temporary, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    temporary.rename(path)
