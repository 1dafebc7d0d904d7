"""The order in which a run reads its data, a function of (seed, step) for all ranks and workers."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import Sampler

from diffcore.core.random import Stream, derive_seed, permutation
from diffcore.training.data.buckets.groups import Groups, Interleaving

__all__ = ["DataOrder"]


class DataOrder(Sampler[list[tuple[int, int]]]):
    """The (index, position) pairs of each micro-batch of a rank.

    The index is that of the item in the data set; the position counts the samples of the run. Every
    epoch is a keyed permutation. Part p of rank r is micro-batch m = p·world + r of
    M = accumulation·world, and holds the samples i·M + m, i = 0, 1, .., of the global batch, which
    is the same for every split. Times that are stratified over the global batch are thus stratified
    over each micro-batch, so that its gradient is that of a smaller batch (`reports.noise_scale`).

    With groups, every global batch is of one bucket. Each bucket has its own endless order of
    epochs, from which its batches are taken one after the other: the remainder of an epoch is
    completed by the next epoch, so that no item is left out or read more often than others. An
    epoch of the whole data, ⌈items / batch⌉ steps, contains each bucket in proportion to its items,
    in a keyed order. In a bucket with several parts, every run of samples contains them in
    proportion to their items times their visits.

    Args:
        size: number of items of the data set.
        seed: seed of the run.
        batch: size of the global batch.
        accumulation: number of micro-batches of a rank in a step.
        rank: index of this rank.
        world: number of ranks.
        groups: buckets and parts of the items; None for data whose items have one shape.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        batch: int,
        accumulation: int,
        rank: int,
        world: int,
        groups: Groups | None = None,
    ) -> None:
        self.size, self.seed, self.batch = size, seed, batch
        self.micro = batch // (accumulation * world)
        self.split = (accumulation, rank, world)
        self.keep_together(1)
        self.span = range(0)
        self.groups = groups
        self._index: Callable[[int], int] = (
            _permuted(size, seed) if groups is None else _GroupedIndex(groups, seed, batch)
        )

    def keep_together(self, group: int) -> "DataOrder":
        """Keep every `group` consecutive samples of the global batch in one micro-batch, in place.

        Args:
            group: number of samples that a coupling pairs (`Coupling.group`), a divisor of the
                micro-batch. They take the place of one sample in the split.

        Returns:
            This order.
        """
        accumulation, rank, world = self.split
        groups = torch.arange(self.batch).view(-1, accumulation, world, group)
        self.parts: list[list[int]] = groups[:, :, rank].transpose(0, 1).flatten(1).tolist()
        return self

    def steps(self, start: int, stop: int) -> "DataOrder":
        """Restrict this order to some optimizer steps, in place.

        Args:
            start: first step.
            stop: step after the last one.

        Returns:
            This order.
        """
        self.span = range(start, stop)
        return self

    def index(self, position: int) -> int:
        """Index of the item at a position of the run.

        Args:
            position: number of samples of the run before this one.

        Returns:
            A number below `size`.
        """
        return self._index(position)

    def shape(self, step: int) -> tuple[int, ...] | None:
        """Shape of x_0 in the batch of a step.

        Args:
            step: optimizer step.

        Returns:
            The shape; None for data whose items have that of the process.
        """
        if self.groups is None or not self.groups.shapes:
            return None
        return self.groups.shape(self.index(step * self.batch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.span:
            for part in self.parts:
                positions = [step * self.batch + index for index in part]
                yield [(self.index(position), position) for position in positions]

    def __len__(self) -> int:
        return len(self.span) * len(self.parts)


def _permuted(size: int, seed: int) -> Callable[[int], int]:
    """The endless sequence of the keyed permutations of range(size)."""
    permutation_of = lru_cache(maxsize=2)(
        lambda epoch: permutation(seed, epoch, size).numpy()  # a list takes five times as much
    )

    def element(position: int) -> int:
        epoch, offset = divmod(position, size)
        return int(permutation_of(epoch)[offset])

    return element


class _GroupedIndex:
    """Index of the item at a position, with every batch of one bucket."""

    def __init__(self, groups: Groups, seed: int, batch: int) -> None:
        self.batch = batch
        members = groups.members()
        rates = {key: len(rows) * Fraction(groups.visits[key[1]]) for key, rows in members.items()}
        buckets = sorted({bucket for bucket, _ in members})
        self.groups = [[key for key in members if key[0] == bucket] for bucket in buckets]
        self.buckets = Interleaving(
            [sum((rates[key] for key in keys), Fraction(0)) for keys in self.groups]
        )
        self.parts = [Interleaving([rates[key] for key in keys]) for keys in self.groups]
        self.steps = math.ceil(sum(rates.values()) / batch)
        """Number of steps of an epoch."""
        self.step_order = _permuted(self.steps, derive_seed(seed, Stream.BUCKET, 0))
        self.rows: dict[tuple[int, int], Any] = {key: rows.numpy() for key, rows in members.items()}
        self.orders = {
            key: _permuted(len(rows), derive_seed(seed, Stream.BUCKET, 1 + number))
            for number, (key, rows) in enumerate(members.items())
        }

    def __call__(self, position: int) -> int:
        step, offset = divmod(position, self.batch)
        epoch = step // self.steps
        bucket, number = self.buckets[epoch * self.steps + self.step_order(step)]
        part, count = self.parts[bucket][number * self.batch + offset]
        key = self.groups[bucket][part]
        return int(self.rows[key][self.orders[key](count)])
