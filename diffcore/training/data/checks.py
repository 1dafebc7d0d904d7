"""Checks of data against the process: items, labels, classes, captions."""

import math
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import index as as_integer
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore.core.condition_values import check_value
from diffcore.core.process import Process
from diffcore.training.data.listing import printable
from diffcore.training.data.source import WEIGHT, DataSource

__all__ = [
    "Item",
    "check_data",
    "check_held_out",
    "prepare_data",
    "process_of_item",
    "process_with_captions",
    "read_item",
    "split_item",
]


class Item(NamedTuple):
    """An item of a data set.

    Args:
        x0: clean data, of the shape of the process.
        label: index of its class or caption; -1 without one.
        extras: further tensors by name, see `DataSource`.
    """

    x0: Tensor
    label: int
    extras: Mapping[str, Tensor]


def process_of_item(process: Process, data: DataSource, index: int) -> Process:
    """The process that an item must fit: that of the run, with the shape of the item's bucket.

    Args:
        process: process of the run.
        data: data source.
        index: index of the item.

    Returns:
        `process` itself if the data has no buckets. Data that pairs x_0 with its noise has the
        range of samples, which is not bounded.
    """
    if data.has_noise:
        process = replace(process, low=-math.inf, high=math.inf)
    if data.groups is None or not data.groups.shapes:
        return process
    return process.resized(data.groups.shape(index))


def read_item(read: Callable[[], Any], index: int, process: Process) -> Item:
    """Read an item and check that it fits the process.

    Args:
        read: returns the item, x_0, (x_0, label) or (x_0, label, extras).
        index: index of the item in the data set, for messages.
        process: process that the item must fit.

    Returns:
        The item, with x_0 of the shape of the process, and its conditions among the extras.

    Raises:
        ValueError: `read` raises an error, or the item does not fit the process. The message
            contains the index.
    """
    try:
        item = read()
    except Exception as error:  # raised by the data set of a user
        is_plain = isinstance(error, ValueError)
        reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
        raise ValueError(f"item {index} of the data cannot be read: {reason}") from error
    found = split_item(item, index)
    _check_x0(found.x0, index, process)
    _check_label(found.label, index, process)
    if WEIGHT in found.extras:
        _check_weight(found.extras[WEIGHT], index, process)
    if not process.conditions:  # the quickest way, as this is done for every item
        return found
    return found._replace(extras={**found.extras, **_conditions(found.extras, index, process)})


def split_item(item: Any, index: int) -> Item:
    """Split an item into x_0, its label and its extras.

    Args:
        item: x_0, (x_0,), (x_0, label) or (x_0, label, extras).
        index: index of the item in the data set, for messages.

    Returns:
        The item; without a label it is -1.

    Raises:
        ValueError: The item has more parts, or the label is no integer.
    """
    if not isinstance(item, (tuple, list)):
        return Item(item, -1, {})
    if len(item) == 1:
        return Item(item[0], -1, {})
    if len(item) not in (2, 3) or (len(item) == 3 and not isinstance(item[2], Mapping)):
        raise ValueError(
            f"item {index} of the data has {len(item)} parts, expected x_0, (x_0, label), or "
            "(x_0, label, dictionary of tensors)"
        )
    x0, label = item[:2]
    try:
        return Item(x0, as_integer(label), item[2] if len(item) == 3 else {})
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise ValueError(
            f"item {index} of the data has the label {reprlib.repr(label)}, expected an integer, "
            "the index of its class: convert it, or return x_0 alone for data without labels"
        ) from None


def _conditions(extras: Mapping[str, Any], index: int, process: Process) -> dict[str, Tensor]:
    """The conditions of the process among the extras of an item, or their default values.

    Raises:
        ValueError: the item lacks a condition without default, or a value does not fit.
    """
    where, records = f"item {index} of the data", process.conditions
    left_out = {name: record for name, record in records.items() if name not in extras}
    defaults = {name: each.default() for name, each in left_out.items() if each.has_default}
    extras = {**defaults, **extras}
    if missing := [name for name in left_out if name not in extras]:
        raise ValueError(
            f"{where} has no condition {missing[0]} (it has {', '.join(extras) or 'none'}): return "
            f"(x_0, label, {{{missing[0]!r}: tensor}}), or leave it out of process.conditions"
        )
    return {
        name: check_value(name, record, extras[name], where) for name, record in records.items()
    }


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
    """Check the classes, all labels that are known without reading items, and the first item.

    The other items are checked when they are read. An item of data that is not ready is not read.

    Args:
        data: data source.
        process: process that the data must fit.

    Raises:
        ValueError: The data does not fit the process.
    """
    _check_classes(data, process)
    if data.labels is not None:
        _check_labels(torch.as_tensor(data.labels), process)
    if data.is_ready:
        read_item(lambda: data[0], 0, process_of_item(process, data, 0))


def check_held_out(held_out: DataSource | None, data: DataSource) -> None:
    """Raise ValueError if labels of held-out data name other classes than those of training data.

    Args:
        held_out: held-out data, or None.
        data: training data.
    """
    if held_out is None or None in (held_out.class_names, data.class_names):
        return
    if held_out.class_names != data.class_names:
        raise ValueError(
            f"the held-out data has the classes {_listed(held_out.class_names or ())}, expected "
            f"those of the training data, {_listed(data.class_names or ())}: give both folders the "
            "same sub-folders"
        )


def prepare_data(
    data: DataSource, process: Process, device: torch.device, is_main_process: bool
) -> None:
    """Make the data readable, then check it.

    Args:
        data: data source.
        process: process that the items must fit.
        device: device on which encoders run.
        is_main_process: True on the rank that does the work.

    Raises:
        ValueError: The data does not fit the process.
    """
    if data.class_names and not process.classes and is_main_process:
        print(
            f"diffcore: process.classes is 0, so that the {len(data.class_names)} classes of the "
            "data are ignored",
            file=sys.stderr,
        )
    data.prepare(device, is_main_process)
    check_data(data, process)


def _check_x0(x0: Any, index: int, process: Process) -> None:
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or tuple(x0.shape) != process.shape:
        raise ValueError(
            f"item {index} of the data is {_describe(x0)}, expected a float tensor of the "
            f"process's shape {process.shape}{_shape_remedy(x0, index)}"
        )
    low, high = (float(bound) for bound in x0.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"item {index} of the data has values that are not finite (NaN or infinite): repair or "
            "remove it"
        )
    if low < process.low - 1e-6 or high > process.high + 1e-6:
        raise ValueError(
            f"item {index} of the data lies in [{low:g}, {high:g}], expected within the process's "
            f"range [{process.low:g}, {process.high:g}]: scale the data, or set process.low and "
            "process.high"
        )


def _check_weight(weight: Tensor, index: int, process: Process) -> None:
    """Raise ValueError if a weight does not broadcast against x_0, is negative or not finite."""
    expected = (1, *process.shape[1:])
    if tuple(weight.shape) not in (expected, (1,) * len(expected)):
        raise ValueError(
            f"item {index} of the data has a weight of shape {tuple(weight.shape)}, expected "
            f"{expected}, one number for each pixel of x_0, or {(1,) * len(expected)}"
        )
    low, high = (float(bound) for bound in weight.aminmax())
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"item {index} of the data has weights in [{low:g}, {high:g}], expected finite numbers "
            "of at least 0"
        )


def _describe(x0: Any) -> str:
    return f"{x0.dtype} of shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__


def _shape_remedy(x0: Any, index: int) -> str:
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        return ""
    if index:
        return ": all items have the same shape"
    channels = (
        f", and network.in_channels and network.out_channels: {len(x0)} for a network of diffusers"
        if x0.ndim == 3
        else ""
    )
    return f": set process.shape: {list(x0.shape)}{channels}, or convert the data"


def _check_classes(data: DataSource, process: Process) -> None:
    names = data.class_names
    if names is None or process.classes in (0, len(names)):
        return
    if not names:
        raise ValueError(
            f"process.classes is {process.classes}, but the data has no classes: put the images "
            "into one sub-folder for each class, or set process.classes: 0 and process.dropout: 0"
        )
    raise ValueError(
        f"process.classes is {process.classes}, but the data has {len(names)} classes, "
        f"{_listed(names)}: set process.classes: {len(names)}"
    )


def _listed(names: Sequence[str]) -> str:
    """The first names of classes as text."""
    return ", ".join([*map(printable, names[:5]), *["..."] * (len(names) > 5)]) or "none"


def _check_labels(labels: Tensor, process: Process) -> None:
    """Raise ValueError for the first label (N,) that is not a class of the process."""
    if process.classes:
        is_wrong = (labels < 0) | (labels >= process.classes)
        for index in is_wrong.nonzero().flatten().tolist()[:1]:
            _check_label(int(labels[index]), index, process)


def _check_label(label: int, index: int, process: Process) -> None:
    """Raise ValueError if a label is not a class of the process, such as the null label."""
    if process.classes and not 0 <= label < process.classes:
        remedy = (
            "return (x_0, label), or set process.classes: 0"  # it is -1 without a label
            if label == -1
            else "set process.classes to the number of classes"
        )
        raise ValueError(
            f"item {index} of the data has label {label}, expected 0 .. {process.classes - 1}: "
            f"{remedy}"
        )
