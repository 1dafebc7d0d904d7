"""The base of generated data sets, whose items are functions of (seed, index)."""

import torch
from torch import Tensor

from diffcore.core.random import Stream, uniform
from diffcore.training.data.cache import hash_content
from diffcore.training.data.source import DataSource

__all__ = ["GeneratedData"]


class GeneratedData(DataSource):
    """A data set that needs no file: item i is a function of (seed, i) and the options.

    Args:
        count: number of items, at least 1.
        seed: 64-bit seed; data sets of other seeds are independent, such as held-out data.
        options: further options, which are part of the hash of the content.

    Raises:
        ValueError: there are no items, or the seed is out of range.
    """

    x0: Tensor
    """(count, *shape) all items."""

    labels: Tensor | None = None

    def __init__(self, count: int, seed: int, *options: float) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 item")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, expected within [0, 2^63)")
        self.count, self.seed, self.options = count, seed, options

    def _uniform(self, number: int) -> Tensor:
        """(count, number) uniform numbers in (0, 1), the same for any count."""
        return uniform(self.seed, Stream.ITEM, torch.arange(self.count), number)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x0[index], -1 if self.labels is None else int(self.labels[index])

    @property
    def content_hash(self) -> str:
        """Hash of the class and its options."""
        return hash_content(type(self).__name__, *map(repr, (self.count, self.seed, self.options)))
