"""Pictures of samples of any shape: images, points, lines of signals, frames of volumes and video.

(n,)           points    coordinates in pairs; one coordinate as a histogram
(C, L)         lines     one panel for each sample, one line for each channel
(C, H, W)      images    1 or 3 channels; frames for others, such as latents
(C, F, H, W)   frames    slices of a volume or frames of a video, side by side
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from diffcore.core.process import Process
from diffcore.io.files import write_file
from diffcore.sampling import images, plots

__all__ = ["COLUMNS", "SUFFIXES", "Columns", "Picture", "check_file", "draw", "picture_of", "save"]

Picture = Literal["auto", "images", "points", "lines", "frames"]

NUMBER_OF_AXES = {"points": (1,), "lines": (1, 2), "images": (3,), "frames": (3, 4)}
SUFFIXES = (".png", ".gif")
"""Suffixes of the files of pictures; .gif is an animation."""


class Columns(NamedTuple):
    """The number of samples in each row of a picture.

    Args:
        preview: number in a preview of a training.
        samples: largest number in the picture of samples without labels.
    """

    preview: int
    samples: int


COLUMNS = {
    "images": Columns(4, 10),
    "points": Columns(500, sys.maxsize),
    "lines": Columns(4, 4),
    "frames": Columns(1, 1),
}
"""Kind of picture -> number of samples in each row."""
FRAMES = 8
"""Largest number of frames, slices or channels of a sample that are shown side by side."""
FRAME_MILLISECONDS = 150


def picture_of(process: Process, picture: Picture = "auto") -> str:
    """The kind of picture of samples.

    Args:
        process: process with the shape of the samples.
        picture: kind; auto: by the shape, see above.

    Returns:
        images, points, lines or frames.

    Raises:
        ValueError: the kind is unknown, or samples of this shape cannot be drawn in this way.
    """
    shape, kind = process.shape, str(picture)
    if kind not in get_args(Picture):
        raise ValueError(f"picture is {kind!r}, expected one of {', '.join(get_args(Picture))}")
    if len(shape) > 4:
        raise ValueError(
            f"samples of shape {shape} have no picture: write .npy or .safetensors instead"
        )
    if kind == "auto":
        kind = ("points", "lines", "images", "frames")[len(shape) - 1]
        return kind if kind != "images" or images.is_image(process) else "frames"
    if kind == "images":
        images.check_image(process)
    if len(shape) not in NUMBER_OF_AXES[kind]:
        fitting = [name for name, axes in NUMBER_OF_AXES.items() if len(shape) in axes]
        raise ValueError(
            f"picture is {kind!r}, but samples have the shape {shape}: expected "
            f"{' or '.join(fitting)}, or auto"
        )
    return kind


def draw(
    x: Tensor, process: Process, rows: Sequence[str], per_row: int, picture: Picture = "auto"
) -> Image.Image:
    """A picture of samples; rows of samples have names.

    Args:
        x: (N, *shape) samples, row after row; the last row may be shorter.
        process: process with the shape and the range of the samples.
        rows: name of each row; for points, of each colour.
        per_row: number of samples in a row.
        picture: kind, see `picture_of`.

    Returns:
        The picture.

    Raises:
        ValueError: samples of this shape cannot be drawn in this way.
    """
    match picture_of(process, picture):
        case "points":
            return plots.draw_points(x, rows, per_row)
        case "lines":
            x = x[:, None] if x.ndim == 2 else x
            return plots.draw_lines(x, process.low, process.high, rows, per_row)
        case "frames":
            frames = _frames(x)
            indices = torch.linspace(0, frames.shape[1] - 1, min(FRAMES, frames.shape[1]))
            frames = frames[:, indices.round().long()]
            return _draw_strips(frames, _with_range(process, frames), rows, per_row)
        case _:
            return images.draw_grid(x, process, rows, per_row)


def check_file(path: str | Path, process: Process, picture: Picture = "auto") -> None:
    """Check that samples can be drawn into a file.

    Args:
        path: file of suffix .png, or .gif for an animation.
        process: process with the shape of the samples.
        picture: kind, see `picture_of`.

    Raises:
        ValueError: samples of this shape cannot be drawn in this way, or have no frames to animate.
    """
    picture_of(process, picture)
    if Path(path).suffix == ".gif" and len(process.shape) != 4:
        raise ValueError(
            f"samples of shape {process.shape} have no frames for an animation, expected (C, T, H, "
            "W): write .png instead"
        )


def save(
    x: Tensor,
    process: Process,
    rows: Sequence[str],
    per_row: int,
    path: str | Path,
    picture: Picture = "auto",
) -> None:
    """Write a picture of samples: .png, or .gif for an animation of volumes or video.

    Args:
        x: (N, *shape) samples, row after row.
        process: process with the shape and the range of the samples.
        rows: name of each row; for points, of each colour.
        per_row: number of samples in a row.
        path: file to write; its folder is created.
        picture: kind, see `picture_of`.

    Raises:
        ValueError: see `check_file`.
    """
    check_file(path, process, picture)
    if Path(path).suffix == ".gif":
        _save_animation(_frames(x), process, rows, per_row, Path(path))
    else:
        images.save_image(draw(x, process, rows, per_row, picture), path)


def _save_animation(
    frames: Tensor, process: Process, rows: Sequence[str], per_row: int, path: Path
) -> None:
    """Write frames (N, F, c, H, W) as an animated GIF that repeats."""
    process = _with_range(process, frames)
    pictures = [
        _draw_strips(frames[:, index, None], process, rows, per_row)
        for index in range(frames.shape[1])
    ]
    content = BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
    )
    write_file(path, content.getvalue())


def _frames(x: Tensor) -> Tensor:
    """Frames (N, F, c, H, W) of samples; channels that are no colours lie below each other.

    Without an axis of frames, (N, C, H, W), the channels are the frames.
    """
    if x.ndim == 4:
        return x[:, :, None]
    if x.shape[1] in (1, 3):
        return rearrange(x, "n c f h w -> n f c h w")
    return rearrange(x, "n c f h w -> n f 1 (c h) w")


def _draw_strips(
    frames: Tensor, process: Process, rows: Sequence[str], per_row: int
) -> Image.Image:
    """A grid of samples (N, F, c, H, W), whose frames lie side by side with a thin line between."""
    enlarged = images.enlarge(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    gap = torch.full_like(enlarged[..., :1], process.high)
    parts = [part for frame in enlarged.unbind(1) for part in (frame, gap[:, 0])][:-1]
    strips = torch.cat(parts, -1)
    sized = replace(process, shape=tuple(strips.shape[1:]))
    return images.draw_grid(strips, sized, rows, per_row)


def _with_range(process: Process, x: Tensor) -> Process:
    """The process; without a range, with that of the finite values of all samples."""
    if -torch.inf < process.low < process.high < torch.inf:
        return process
    finite = x[x.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return replace(process, low=low, high=high if high > low else low + 1)
