"""The arguments of a pipeline call that define how many images are drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_images", "expand_labels"]


def count_images(**given: Any) -> int:
    """The number of images that the arguments of a call define; 1 if they define none.

    Args:
        **given: batch_size, class_labels, seeds and generator, each None if it is not passed.

    Returns:
        The number of images N.

    Raises:
        ValueError: The arguments define different numbers, or both seeds and generators are passed.
    """
    lengths = {
        name: value if name == "batch_size" else _length(value) for name, value in given.items()
    }
    counts = {name: count for name, count in lengths.items() if count is not None}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} by {name}" for name, count in counts.items())
        raise ValueError(f"the call defines {text}: pass as many of each")
    if given["seeds"] is not None and given["generator"] is not None:
        raise ValueError("seeds and generator were given: pass one of them")
    return next(iter(counts.values()), 1)


def expand_labels(class_labels: Any, count: int) -> Tensor | None:
    """(count,) labels on the host, or None; a single label is repeated."""
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels, device="cpu")
    return labels if labels.ndim else labels.expand(count)


def _length(value: Any) -> int | None:
    """Length of a list or tensor; None for a single value, which applies to all images."""
    has_length = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, Sequence)
    return len(value) if has_length else None
