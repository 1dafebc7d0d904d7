"""Previews during training: samples of each of the first classes or captions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image

from diffcore.core.conditions import LABEL
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.sampling import pictures
from diffcore.sampling.generation import Samples
from diffcore.sampling.pictures import Picture
from diffcore.training.data.checks import read_item
from diffcore.training.data.source import DataSource

__all__ = ["check_drawable", "preview"]

ROWS, UNLABELLED_ROWS, LETTERS = 10, 4, 24


def check_drawable(data: DataSource, process: Process, picture: Picture = "auto") -> None:
    """Raise ValueError if samples are neither latents that the data set decodes nor can be drawn.

    Args:
        data: data source.
        process: process with the shape of the samples.
        picture: kind of picture.
    """
    if not data.is_latent:
        pictures.picture_of(process, picture)


def preview(
    denoiser: Denoiser, data: DataSource, draw: Callable[..., Samples], picture: Picture = "auto"
) -> Image.Image:
    """A picture of samples of a denoiser, always of the first seeds.

    Args:
        denoiser: network with its process.
        data: data source, which decodes latents and names the labels.
        draw: called as `draw(denoiser, seeds=, condition=, batch_size=)`.
        picture: kind of picture; auto: by the shape of the samples.

    Returns:
        The picture, one row (for points, one colour) for each of the first classes or captions; of
        named conditions, a row has those of one item of the data.
    """
    process = denoiser.process
    kind = "images" if data.is_latent else pictures.picture_of(process, picture)
    columns = pictures.COLUMNS[kind]
    unlabelled = 1 if kind == "points" and not process.conditions else UNLABELLED_ROWS
    rows = range(min(process.classes, ROWS) or unlabelled)
    labels = [row for row in rows for _ in range(columns)]
    condition = _conditions(data, process, labels)
    x = draw(denoiser, seeds=range(len(labels)), condition=condition, batch_size=len(labels)).x
    if data.is_latent:
        x = data.decode(x)
        process = Process(shape=tuple(x.shape[1:]))
    names = [_name(data, row) if process.classes else "" for row in rows]
    return pictures.draw(x, process, names, columns, "auto" if data.is_latent else picture)


def _conditions(data: DataSource, process: Process, rows: list[int]) -> Any:
    """The condition of each sample: its row as class, and the named ones of the item of that row.

    The items are spread evenly over the data.
    """
    label = rows if process.classes else None
    if not process.conditions:
        return label
    count = max(rows) + 1
    indices = [row * len(data) // count for row in rows]
    items = [read_item(partial(data.__getitem__, i), i, process) for i in indices]
    named = {
        name: torch.stack([item.extras[name] for item in items]) for name in process.conditions
    }
    return named | ({LABEL: label} if label else {})


def _name(data: DataSource, label: int) -> str:
    names = data.texts or data.class_names
    return names[label][:LETTERS] if names else str(label)
