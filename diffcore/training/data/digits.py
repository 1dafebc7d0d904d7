"""The bundled digits data set."""

from typing import Literal

import torch
from torch import Tensor

from diffcore.io.extras import import_extra
from diffcore.training.data.source import DataSource

__all__ = ["Digits"]

HELD_OUT = 297


class Digits(DataSource):
    """The UCI handwritten digits of scikit-learn: 1797 scans in 10 classes, 8x8 pixels in [-1, 1].

    The last 297 scans are held out; they are by other writers than most of the first 1500.

    Args:
        split: train (the first 1500 scans) or test (the last 297).

    Raises:
        ValueError: The split is unknown.
    """

    labels: Tensor

    def __init__(self, split: Literal["train", "test"] = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}, expected train or test")
        bundled = import_extra("sklearn.datasets", "The digits data set")
        pixels, labels = bundled.load_digits(return_X_y=True)
        rows = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
        self.x0 = torch.tensor(pixels[rows] / 8 - 1, dtype=torch.float32).unflatten(1, (1, 8, 8))
        self.labels = torch.tensor(labels[rows])

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x0[index], int(self.labels[index])
