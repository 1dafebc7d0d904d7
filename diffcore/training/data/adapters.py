"""Data sets of torch as data sources: plain ones, and subsets of data sources."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from diffcore.training.data.cache import hash_content
from diffcore.training.data.source import DataSource

__all__ = ["WrappedSource", "as_data_source"]


def as_data_source(data: Dataset[Any]) -> DataSource:
    """A data set as a `DataSource`.

    Args:
        data: map-style data set.

    Returns:
        `data` itself if it is a `DataSource`; for a `Subset`, some items of the data source below
        it; else an adapter with the defaults.

    Raises:
        ValueError: The data set is not map-style (it has no length), it is empty, it joins data
            sources, or it is a part of a stream.
    """
    size = len(data) if isinstance(data, (DataSource, Sized)) else None
    if size is None:
        raise ValueError(
            f"{type(data).__name__} has no length: expected a map-style data set (__len__ and "
            "__getitem__)"
        )
    if not size:
        raise ValueError(f"{type(data).__name__} is empty")
    if isinstance(data, DataSource):
        return data
    if isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        return _SubsetSource(data)
    if source := _source_below(data):
        raise ValueError(
            f"{type(data).__name__} does not pass on what {type(source).__name__} provides besides "
            "its items, such as mirroring, captions and class names: put all files into one "
            "folder, or derive a class from DataSource"
        )
    return _PlainSource(data)


def _source_below(data: Dataset[Any]) -> DataSource | None:
    """A data source inside a wrapper of torch, or None."""
    if isinstance(data, Subset):
        return _source_below(data.dataset)
    if isinstance(data, ConcatDataset):
        return next(filter(None, map(_source_below, data.datasets)), None)
    return data if isinstance(data, DataSource) else None


class _PlainSource(DataSource):
    """A data set with the default of every optional member."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data
        if isinstance(data, TensorDataset) and len(data.tensors) == 2:
            label = data.tensors[1]
            # Labels of another form are refused with the index of their item.
            self.labels = label if label.ndim == 1 and not label.is_floating_point() else None

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.data, Sized) else 0

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class WrappedSource(DataSource):
    """The items of another data source, with everything else that it provides.

    A subclass overrides what it changes.

    Args:
        source: data source.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.texts, self.class_names = source.texts, source.class_names
        self.is_latent, self.has_masks = source.is_latent, source.has_masks
        self.has_noise = source.has_noise
        self.inputs = dict(source.inputs)  # a mapping proxy cannot be sent to a worker
        self.groups, self.labels = source.groups, source.labels
        self.is_stream = source.is_stream

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source[index]

    def item(self, index: int, seed: int, position: int) -> Any:
        return self.source.item(index, seed, position)

    @property
    def vae(self) -> Any:
        return self.source.vae

    @property
    def content_hash(self) -> str:
        return self.source.content_hash

    @property
    def encoder_hash(self) -> str:
        return self.source.encoder_hash

    def prompts(self) -> Any:
        return self.source.prompts()

    @property
    def is_ready(self) -> bool:
        return self.source.is_ready

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        self.source.prepare(device, is_main_process)

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        return self.source.label_wrapper(device)

    def prompt_wrapper(
        self, prompts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        return self.source.prompt_wrapper(prompts, negative, device)

    def decode(self, x: Tensor) -> Tensor:
        return self.source.decode(x)


class _SubsetSource(WrappedSource):
    """Some items of a data source, with everything else that it provides."""

    def __init__(self, subset: Subset[Any]) -> None:
        super().__init__(as_data_source(subset.dataset))
        if self.is_stream:
            raise ValueError(
                f"{type(self.source).__name__} is read only in its own order, which a Subset does "
                "not have: leave out files, or use a data set that is not a stream"
            )
        self.indices = [int(index) for index in subset.indices]
        groups, labels = self.source.groups, self.source.labels
        self.groups = None if groups is None else groups.select(self.indices)
        self.labels = None if labels is None else [int(labels[index]) for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]

    def item(self, index: int, seed: int, position: int) -> Any:
        return self.source.item(self.indices[index], seed, position)

    @property
    def content_hash(self) -> str:
        return hash_content(self.source.content_hash, *map(str, self.indices))
