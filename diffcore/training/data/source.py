"""The data protocol of training: what a data set must provide, and what it may provide.

Any map-style torch `Dataset` whose items are x_0 or (x_0, label) is a data set: `as_data_source`
adapts it. A data set that augments, encodes, or has captions derives from `DataSource` and
overrides the members that it needs.
"""

from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffcore.core.process import Process

__all__ = [
    "DataSource",
    "as_data_source",
    "check_data",
    "check_labels",
    "prepare_data",
    "process_with_captions",
    "split_item",
]


class DataSource(Dataset[Any]):
    """A map-style data set for training. Its items are x_0 or (x_0, label).

    x_0 is a float tensor of the shape and range of the process; the label is an integer in
    0 .. classes - 1. A subclass implements `__len__` and `__getitem__`; every other member has a
    default.
    """

    texts: tuple[str, ...] = ()
    """Captions; a label is an index into them. Empty: labels are classes, or there are none."""

    is_latent: bool = False
    """True if x_0 are latents; a data set of latents also overrides `decode`."""

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, seed: int, position: int) -> Any:
        """The item at a position of the run, with its augmentation.

        Args:
            index: index of the item in the data set.
            seed: seed of the run.
            position: number of samples of the run before this one; the key of everything random.

        Returns:
            x_0 or (x_0, label); by default `self[index]`.
        """
        return self[index]

    @property
    def vae(self) -> Any:
        """Decoder of the latents, which a run writes into its pipeline; None without one."""
        return None

    @property
    def content_hash(self) -> str:
        """Hash of everything that the items are made of; "" if unknown.

        A run is not resumed on data with another hash.
        """
        return ""

    @property
    def is_ready(self) -> bool:
        """True if items can be read; otherwise `prepare` makes them readable."""
        return True

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        """Make the items readable. The trainer calls it on every rank before it builds the network.

        Args:
            device: device on which encoders run.
            is_main_process: True on one rank, which does the work while the others wait.
        """

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a network so that it accepts the labels of this data set.

        Args:
            device: device of the network.

        Returns:
            By default the identity. A data set with captions returns a wrapper that looks up the
            text embedding of a label. Only the wrapped network is trained and saved.
        """
        return lambda network: network

    def decode(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of x_0 (N, *shape); by default x_0 itself."""
        return x


class _PlainSource(DataSource):
    """A data set with the default of every optional member."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.data, Sized) else 0

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def as_data_source(data: Dataset[Any]) -> DataSource:
    """A data set as a `DataSource`.

    Args:
        data: map-style data set.

    Returns:
        `data` itself if it is a `DataSource`, else an adapter with the defaults.

    Raises:
        ValueError: The data set is not map-style (it has no length), or it is empty.
    """
    if not isinstance(data, (DataSource, Sized)):
        raise ValueError(
            f"{type(data).__name__} has no length: expected a map-style data set (__len__ and "
            "__getitem__)"
        )
    if not len(data):
        raise ValueError(f"{type(data).__name__} is empty")
    return data if isinstance(data, DataSource) else _PlainSource(data)


def split_item(item: Any) -> tuple[Tensor, int]:
    """(x_0, label) of an item, a tensor of shape (*shape) and a number; -1 without a label."""
    return (item[0], int(item[1])) if isinstance(item, (tuple, list)) else (item, -1)


def process_with_captions(process: Process, data: DataSource) -> Process:
    """The process with one class for each caption of the data.

    Args:
        process: process of the settings; `classes` is 0 or the number of captions.
        data: data source.

    Returns:
        `process` itself if the data has no captions.

    Raises:
        ValueError: `classes` is another number, or a condition is dropped that does not exist.
    """
    if texts := data.texts:
        if process.classes not in (0, len(texts)):
            raise ValueError(
                f"classes is {process.classes}, but the data has {len(texts)} captions: leave "
                "classes out"
            )
        process = replace(process, classes=len(texts))
    if process.dropout and not process.classes:
        raise ValueError(
            f"dropout is {process.dropout}, but the data has no captions and classes is 0: there "
            "is no condition to drop; set dropout: 0"
        )
    return process


def check_data(data: DataSource, process: Process) -> None:
    """Raise ValueError if the first item does not fit the process.

    Data that is not ready is not checked.
    """
    if not data.is_ready:
        return
    x0, label = split_item(data[0])
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or tuple(x0.shape) != process.shape:
        found = (
            f"{x0.dtype} of shape {tuple(x0.shape)}"
            if isinstance(x0, Tensor)
            else type(x0).__name__
        )
        raise ValueError(
            f"an item of the data is {found}, expected a float tensor of the process's shape "
            f"{process.shape}"
        )
    if x0.min() < process.low - 1e-6 or x0.max() > process.high + 1e-6:
        raise ValueError(
            f"an item of the data lies in [{float(x0.min()):g}, {float(x0.max()):g}], expected "
            f"within the process's range [{process.low:g}, {process.high:g}]: scale the data, or "
            "set process.low and process.high"
        )
    check_labels(torch.tensor([label]), torch.tensor([0]), process)


def prepare_data(
    data: DataSource, process: Process, device: torch.device, is_main_process: bool
) -> None:
    """Make the data readable, then check its first item.

    Args:
        data: data source.
        process: process that the items must fit.
        device: device on which encoders run.
        is_main_process: True on the rank that does the work.
    """
    data.prepare(device, is_main_process)
    check_data(data, process)


def check_labels(label: Tensor, index: Tensor, process: Process) -> None:
    """Raise ValueError if a label is not a class of the process, such as the null label.

    Args:
        label: (B,) labels on the host.
        index: (B,) index of each sample in the data set.
        process: process with the number of classes; without classes every label is accepted.
    """
    wrong = (label < 0) | (label >= process.classes)
    if process.classes and wrong.any():
        raise ValueError(
            f"item {int(index[wrong][0])} of the data has label {int(label[wrong][0])}, expected "
            f"0 .. {process.classes - 1}: set process.classes to the number of classes"
        )
