"""Previews during training: one row of four samples for each of the first classes or captions."""

from collections.abc import Callable

from PIL import Image

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.sampling import images
from diffcore.sampling.generation import Samples
from diffcore.training.data.source import DataSource

__all__ = ["is_drawable", "preview"]

ROWS, COLUMNS, LETTERS = 10, 4, 24


def is_drawable(data: DataSource, process: Process) -> bool:
    """True if samples are images, or latents that the data set decodes."""
    return data.is_latent or images.is_image(process)


def preview(denoiser: Denoiser, data: DataSource, draw: Callable[..., Samples]) -> Image.Image:
    """A grid of samples of a denoiser, always of the first seeds.

    Args:
        denoiser: network with its process.
        data: data source, which decodes latents and names the labels.
        draw: called as `draw(denoiser, seeds=, condition=, batch_size=)`.

    Returns:
        The grid, one row for each of the first classes or captions.
    """
    process = denoiser.process
    rows = range(min(process.classes, ROWS) or COLUMNS)
    labels = [row for row in rows for _ in range(COLUMNS)]
    condition = labels if process.classes else None
    x = draw(denoiser, seeds=range(len(labels)), condition=condition, batch_size=len(labels)).x
    if data.is_latent:
        x = data.decode(x)
        process = Process(shape=tuple(x.shape[1:]))
    return images.draw_grid(
        x, process, [_name(data, row) if condition else "" for row in rows], COLUMNS
    )


def _name(data: DataSource, label: int) -> str:
    names = data.texts or data.class_names
    return names[label][:LETTERS] if names else str(label)
