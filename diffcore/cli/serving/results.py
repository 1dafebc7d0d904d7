"""Samples in the format that a request names."""

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from diffcore.cli.serving.messages import Format, GenerateMessage
from diffcore.core.process import Process
from diffcore.sampling import Samples
from diffcore.sampling.images import draw_grid, is_image, to_image, to_pixels

__all__ = ["MEDIA_TYPES", "check_format", "encode_samples"]

MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "npy": "application/octet-stream",
    "safetensors": "application/octet-stream",
    "json": "application/json",
}
"""Format -> media type of the response."""
COLUMNS = 8
"""Maximum number of images in a row of a sheet."""


def check_format(message: GenerateMessage, process: Process) -> None:
    """Raise ValueError if the samples of a process have no such format."""
    if message.format == "png" and not is_image(process):
        raise ValueError(
            f"format is png, but samples of shape {process.shape} are no images of 1 or 3 "
            "channels: use npy, safetensors or json"
        )


def encode_samples(
    message: GenerateMessage, samples: Samples, process: Process, null_label: int
) -> bytes:
    """Encode samples in the format of a message.

    Args:
        message: the message that requested them.
        samples: the samples, with decoded x.
        process: process with the shape and the range of the samples.
        null_label: label of samples without one.

    Returns:
        The body of the response.

    Raises:
        ValueError: samples are not finite.
    """
    x, seeds = samples.x, message.seeds
    bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(x)} samples are not finite, such as that of seed {seeds[bad[0]]}: "
            "use less guidance, more steps or another sampler"
        )
    labels = message.labels or [null_label] * len(seeds)
    match message.format:
        case "png":
            return _png(x, process)
        case "npy":
            return _npy(x)
        case "safetensors":
            tensors = {"x": x, "seed": torch.tensor(seeds), "label": torch.tensor(labels)}
            return save({name: value.contiguous() for name, value in tensors.items()})
        case "json":
            return json.dumps(_table(x, process, samples, seeds, labels)).encode()


def _png(x: Tensor, process: Process) -> bytes:
    """One image, or a sheet of several."""
    if len(x) == 1:
        return _encode(to_image(to_pixels(x, process)[0]))
    columns = min(len(x), COLUMNS)
    return _encode(draw_grid(x, process, [""] * -(-len(x) // columns), columns))


def _encode(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def _npy(x: Tensor) -> bytes:
    content = BytesIO()
    np.save(content, x.numpy())
    return content.getvalue()


def _table(
    x: Tensor, process: Process, samples: Samples, seeds: Sequence[int], labels: Sequence[int]
) -> dict[str, Any]:
    """Each sample as base64 of a PNG file, or of an .npy file if it is no image."""
    kind = "png" if is_image(process) else "npy"
    if kind == "png":
        files = [_encode(to_image(pixels)) for pixels in to_pixels(x, process)]
    else:
        files = [_npy(sample) for sample in x]
    return {
        "encoding": kind,
        "samples": [base64.b64encode(file).decode() for file in files],
        "seeds": list(seeds),
        "labels": list(labels),
        "evaluations": samples.evaluations,
    }
