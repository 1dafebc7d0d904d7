"""Pictures along the way: four samples of each of the first classes or captions, in a row each."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.sampling import images
from diffcore.sampling.generation import Samples

ROWS, COLUMNS, LETTERS = 10, 4, 24


def drawable(data: Dataset[Any], process: Process) -> bool:
    """Whether samples are pictures, or latents that the data set decodes."""
    return images.drawable(process) or hasattr(data, "pictures")


def picture(
    denoiser: Denoiser, data: Dataset[Any], integrate: Callable[..., Samples]
) -> Image.Image:
    """Samples of a denoiser, as `integrate(denoiser, seeds=, condition=, batch_size=)` makes them; the first seeds, always."""
    process = denoiser.process
    rows = range(min(process.classes, ROWS) or COLUMNS)
    labels = [row for row in rows for _ in range(COLUMNS)]
    condition = labels if process.classes else None
    x = integrate(denoiser, seeds=range(len(labels)), condition=condition, batch_size=len(labels)).x
    if hasattr(data, "pictures"):
        x = data.pictures(x)
        process = Process(shape=tuple(x.shape[1:]))
    return images.grid(x, process, [_name(data, row) if condition else "" for row in rows], COLUMNS)


def _name(data: Dataset[Any], label: int) -> str:
    texts = getattr(data, "texts", ())
    return texts[label][:LETTERS] if texts else str(label)
