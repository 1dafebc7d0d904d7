"""Groups of items: buckets, whose items share batches, and parts, which are read at given rates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from diffcore.training.data.cache import hash_content

__all__ = ["Groups", "Interleaving"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The bucket and the part of each item of a data set.

    All items of a batch are of one bucket. A part is read `visits` times in an epoch.

    Args:
        shapes: shape of x_0 in each bucket; () for one bucket of the shape of the process.
        bucket: (N,) int64 index of each item's bucket in `shapes`.
        part: (N,) int64 index of each item's part in `visits`; None for a single part.
        visits: mean number of times that an item of each part is read in an epoch, above 0.

    Raises:
        ValueError: A bucket or a part is out of range, or a number of visits is not positive.

    Example:
        >>> groups = Groups(((1, 8, 8), (1, 4, 16)), torch.tensor([0, 1, 1]))
        >>> groups.shape(2)
        (1, 4, 16)
    """

    shapes: tuple[tuple[int, ...], ...]
    bucket: Tensor
    part: Tensor | None = None
    visits: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        part = torch.zeros_like(self.bucket) if self.part is None else self.part
        object.__setattr__(self, "part", part)
        for name, index, count in (
            ("bucket", self.bucket, len(self.shapes) or 1),
            ("part", part, len(self.visits)),
        ):
            if len(index) != len(self.bucket) or bool(((index < 0) | (index >= count)).any()):
                raise ValueError(
                    f"{name} is {tuple(index.shape)} with values up to {int(index.max())}, "
                    f"expected one index in 0 .. {count - 1} for each of {len(self.bucket)} items"
                )
        if not all(0 < visits < float("inf") for visits in self.visits):
            raise ValueError(f"visits is {self.visits}, expected positive finite numbers")

    def __len__(self) -> int:
        return len(self.bucket)

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of x_0 of an item.

        Args:
            index: index of the item.

        Returns:
            (C, H, W), or another shape of the data.
        """
        return self.shapes[int(self.bucket[index])]

    def members(self) -> dict[tuple[int, int], Tensor]:
        """The items of each bucket and part that has some.

        Returns:
            (bucket, part) -> (n,) indices in ascending order, sorted by bucket and part.
        """
        assert self.part is not None
        key = self.bucket * len(self.visits) + self.part
        return {
            divmod(number, len(self.visits)): (key == number).nonzero().flatten()
            for number in key.unique().tolist()
        }

    def select(self, indices: Sequence[int]) -> "Groups":
        """The groups of some of the items, in the given order.

        Returns:
            Groups of len(indices) items with the same shapes and visits.
        """
        assert self.part is not None
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return replace(self, bucket=self.bucket[rows], part=self.part[rows])

    @property
    def content_hash(self) -> str:
        """Hash of the shapes, buckets, parts and visits."""
        assert self.part is not None
        arrays = (self.bucket.tolist(), self.part.tolist())
        return hash_content(*map(str, (self.shapes, self.visits, *arrays)))


class Interleaving:
    """An endless sequence of parts in given proportions, as evenly as possible.

        n_1(t) = ⌊f_1 t + ½⌋,   f_1 = r_1 / Σ r

    is the number of elements of the first part among the first t; the remaining t - n_1(t) are
    divided among the other parts in the same way. Any run of elements therefore contains each of
    two parts in its proportion to one element.

    Args:
        rates: r, positive proportions of the parts.

    Example:
        >>> sequence = Interleaving([Fraction(1), Fraction(2)])
        >>> sequence[0], sequence[1], sequence[2], sequence[3]
        ((1, 0), (0, 0), (1, 1), (1, 2))
    """

    def __init__(self, rates: Sequence[Fraction]) -> None:
        rest = [sum(rates[first:], Fraction(0)) for first in range(len(rates))]
        self.shares = [rate / total for rate, total in zip(rates, rest, strict=True)]

    def __getitem__(self, element: int) -> tuple[int, int]:
        """The part of an element, and the number of earlier elements of this part."""
        for part, share in enumerate(self.shares[:-1]):
            before = _rounded(share, element)
            if _rounded(share, element + 1) > before:
                return part, before
            element -= before
        return len(self.shares) - 1, element


def _rounded(share: Fraction, count: int) -> int:
    """⌊share·count + ½⌋ in exact integers."""
    return (2 * share.numerator * count + share.denominator) // (2 * share.denominator)
