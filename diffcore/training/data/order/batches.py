"""Micro-batches, read in the order of a run by this process or by workers."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from traceback import format_exception
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.training.data.checks import process_of_item, read_item
from diffcore.training.data.order.sequence import DataOrder
from diffcore.training.data.source import DataSource

__all__ = ["Batch", "is_mirrored", "load_batches"]


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch of a rank.

    Args:
        x0: (B, *shape) clean data.
        label: (B,) labels; -1 where the data has none.
        index: (B,) index of each sample in the data set.
        batch_index: (B,) index of each sample in the global batch.
        extras: what the items hold beside x_0 and label, by name, each (B, ...).
    """

    x0: Tensor
    label: Tensor
    index: Tensor
    batch_index: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def first(self, count: int) -> "Batch":
        """The first samples.

        Args:
            count: largest number of samples.

        Returns:
            A batch of at most `count` samples.
        """
        x0, label = self.x0[:count], self.label[:count]
        extras = {name: value[:count] for name, value in self.extras.items()}
        return Batch(x0, label, self.index[:count], self.batch_index[:count], extras)


def load_batches(
    data: DataSource,
    order: DataOrder,
    process: Process,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = True,
) -> Iterator[Batch]:
    """The micro-batches of a data order.

    Args:
        data: data source, ready to be read.
        order: order and span of steps.
        process: process that every item must fit.
        workers: number of processes that read data; 0 reads in this process.
        prefetch: number of micro-batches that each worker reads ahead.
        pin_memory: whether they are read into page-locked memory where there is a GPU.

    Returns:
        An iterator over the micro-batches of the steps of `order`. It raises a ValueError with the
        index of an item that cannot be read or does not fit the process, or if a worker ended.
    """
    loader = DataLoader(
        _PositionedItems(data, order.seed, order.batch, process),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        multiprocessing_context=_fork_server() if workers else None,
        worker_init_fn=_follow_training_process,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    return map(_as_batch, _explain_lost_workers(loader))


def is_mirrored(seed: int, position: int) -> bool:
    """Whether the image at a position of the run is mirrored.

    Args:
        seed: seed of the run.
        position: number of samples of the run before this one.

    Returns:
        True for half of the positions.
    """
    return bool(uniform(seed, Stream.AUGMENT, position) < 0.5)


def _fork_server() -> BaseContext:
    """The start method of workers: the server imports torch once, and its forks need not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _explain_lost_workers(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The micro-batches of a loader; the end of a worker is an error that names the remedy."""
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch has no class for this error
            raise
        raise ValueError(
            f"a worker that loads data ended ({error}): if memory ran out, use fewer --workers or "
            "a larger /dev/shm (docker: --shm-size); if a library crashed, --workers 0 shows where"
        ) from error


def _follow_training_process(worker: int) -> None:
    """Let a worker end with the training process, and not before it by a signal to both.

    The parent of a worker is the fork server, so that the watchdog of torch does not notice when
    the training process is killed.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The first SIGTERM may be sent to the whole job, which is to save; a second one ends a worker.
    signal.signal(
        signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    )
    threading.Thread(target=_end_with_training_process, daemon=True).start()


def _end_with_training_process() -> None:
    training = multiprocessing.parent_process()
    if training is not None:
        training.join()
        os._exit(1)


class _PositionedItems(Dataset[Any]):
    """A data source indexed by (index, position); what is random depends only on the position.

    An item is (x_0, label, index, index in the batch, extras), or the error that it cannot be used:
    a worker that raised it would send the text of a traceback instead.
    """

    def __init__(self, data: DataSource, seed: int, batch: int, process: Process) -> None:
        self.data, self.seed, self.batch, self.process = data, seed, batch, process

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...] | ValueError:
        index, position = key
        try:
            x0, label, extras = read_item(
                lambda: self.data.item(index, self.seed, position),
                index,
                process_of_item(self.process, self.data, index),
            )
        except ValueError as error:
            if get_worker_info():  # a worker sends the error without its cause
                error.add_note("".join(format_exception(error)))
            return error
        return x0, label, index, position % self.batch, extras


def _collate(items: list[Any]) -> Any:
    """The columns of a micro-batch, or the first error among its items."""
    errors = [item for item in items if isinstance(item, ValueError)]
    if errors:
        return errors[0]
    expected = _extras(items[0])
    for item in items:
        if (found := _extras(item)) != expected:
            return ValueError(
                f"items {items[0][2]} and {item[2]} of the data have the extras {expected} and "
                f"{found}, expected the same names and shapes in all items"
            )
    return default_collate(items)


def _extras(item: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the extras of an item."""
    return {name: tuple(value.shape) for name, value in item[4].items()}


def _as_batch(columns: Any) -> Batch:
    if isinstance(columns, ValueError):
        raise columns
    return Batch(*columns)
