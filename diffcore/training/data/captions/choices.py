"""The labels with which each image can be read, in two tensors instead of objects."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

__all__ = ["CaptionChoices"]


class CaptionChoices:
    """One or more labels for each image.

    Args:
        labels: (sum of the numbers of labels,) int64, those of one image after the other.
        ends: (M,) int64, the index in `labels` at which those of each image end.

    Example:
        >>> index = {"cat": 0, "dog": 1, "tabby": 2}
        >>> choices = CaptionChoices.of([("cat", "tabby"), ("dog",)], index)
        >>> choices[0].tolist(), choices.first.tolist()
        ([0, 2], [0, 1])
    """

    def __init__(self, labels: Tensor, ends: Tensor) -> None:
        self.labels, self.ends = labels, ends

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]], index: Mapping[str, int]) -> Self:
        """The labels of texts.

        Args:
            texts: texts of each image, at least one.
            index: text -> label.

        Returns:
            The labels of each image, in the order of its texts.
        """
        labels: list[int] = []
        lengths: list[int] = []
        for own in texts:
            labels += [index[text] for text in own]
            lengths.append(len(own))
        return cls(torch.tensor(labels), torch.tensor(lengths).cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, image: int) -> Tensor:
        """The labels of an image."""
        return self.labels[int(self.ends[image - 1]) if image else 0 : int(self.ends[image])]

    @property
    def first(self) -> Tensor:
        """(M,) the first label of each image."""
        return self.labels[torch.cat([self.ends.new_zeros(1), self.ends[:-1]])]

    @property
    def is_single(self) -> bool:
        """Whether each image has one label."""
        return len(self.labels) == len(self)
