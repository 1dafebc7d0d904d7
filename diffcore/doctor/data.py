"""Checks of the items of a training's data: range, scale, duplicates, labels."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.doctor.findings import Finding
from diffcore.training.data.checks import process_of_item, read_item
from diffcore.training.data.source import DataSource

__all__ = ["DataSample", "check_items", "check_labels", "find_repeats", "read_sample"]

T = TypeVar("T")
MAXIMUM_NUMBERS = 2**27
"""Largest number of entries of x_0 that are kept in memory, half a gigabyte of float32."""
LISTED = 3
"""Number of items or classes that a sentence lists."""
RARE, IMBALANCE = 10, 10.0
"""Number of samples below which a class is rare; ratio of the largest to the smallest class."""


@dataclass(frozen=True)
class DataSample:
    """Items that were read, evenly spread over the data set.

    Args:
        total: number of items of the data set.
        indices: indices of the items that could be read.
        x0: x_0 of each.
        labels: their labels; -1 without one.
        failures: messages of the items that could not be read.
    """

    total: int
    indices: list[int]
    x0: list[Tensor]
    labels: list[int]
    failures: list[str]


def read_sample(data: DataSource, process: Process, seed: int, count: int) -> DataSample:
    """Read items as training reads them.

    Args:
        data: data source, ready to be read.
        process: process that every item must fit.
        seed: seed of the run, for items that are drawn or augmented.
        count: largest number of items.

    Returns:
        The items, and the messages of those that cannot be read or do not fit the process.
    """
    total = len(data)
    numbers = max(torch.Size(process.shape).numel(), 1)
    count = max(min(count, total, MAXIMUM_NUMBERS // numbers), 1)
    indices, items, labels, failures = [], [], [], []
    for index in (i * total // count for i in range(count)):
        try:
            x0, label, _ = read_item(
                lambda i=index: data.item(i, seed, i),  # type: ignore[misc]
                index,
                process_of_item(process, data, index),
            )
        except ValueError as error:
            failures.append(str(error))
            continue
        indices.append(index)
        items.append(x0)
        labels.append(label)
    return DataSample(total, indices, items, labels, failures)


def check_items(sample: DataSample, process: Process) -> list[Finding]:
    """Check range, scale and duplicates of items.

    Args:
        sample: the items.
        process: process that they must fit.

    Returns:
        One finding for each check; only that of the reading if no item could be read.
    """
    findings = [_reading(sample)]
    if sample.x0:
        # (C, numbers of all items), which may be of several sizes
        channels = torch.cat([x0.double().reshape(len(x0), -1) for x0 in sample.x0], 1)
        statistics = _statistics(channels)
        findings += [
            _data_range(statistics, process),
            _sigma_data(channels, process),
            _duplicates(sample),
        ]
    return findings


def _reading(sample: DataSample) -> Finding:
    name, count = "items", len(sample.indices) + len(sample.failures)
    if sample.failures:
        listed = "; ".join(sample.failures[:LISTED])
        return Finding(
            name,
            "wrong",
            f"{len(sample.failures)} of {count} items that were read cannot be trained on: "
            f"{listed}",
            {"failures": sample.failures},
        )
    return Finding(
        name, "ok", f"{count} of {sample.total} items were read, and fit the process.", {}
    )


def _statistics(channels: Tensor) -> dict[str, list[float]]:
    """Minimum, maximum, mean and standard deviation of each row of (C, numbers)."""
    return {
        "min": channels.amin(1).tolist(),
        "max": channels.amax(1).tolist(),
        "mean": channels.mean(1).tolist(),
        "std": channels.std(1, correction=0).tolist(),
    }


def _data_range(statistics: dict[str, list[float]], process: Process) -> Finding:
    name, low, high = "data range", min(statistics["min"]), max(statistics["max"])
    measured = f"x_0 lies in [{low:.3g}, {high:.3g}]; by channel, " + ", ".join(
        f"{key} {_numbers(statistics[key])}" for key in ("min", "max", "mean", "std")
    )
    flat = [i for i, std in enumerate(statistics["std"]) if std == 0]
    expected = f"[{process.low:g}, {process.high:g}]"
    if flat:
        return Finding(
            name,
            "wrong",
            f"{measured}. Channel {flat[0]} is constant over all items: remove it, or repair the "
            "data.",
            statistics,
        )
    if process.high < torch.inf and process.low > -torch.inf:
        width = process.high - process.low
        if low > process.low + 0.3 * width or high < process.high - 0.3 * width:
            return Finding(
                name,
                "wrong",
                f"{measured}, but the process's range is {expected}: scale the data to fill it "
                "(values in [0, 1] are usually meant to be 2 x - 1), or set process.low and "
                "process.high.",
                statistics,
            )
    return Finding(name, "ok", f"{measured}; the process's range is {expected}.", statistics)


def _numbers(values: Sequence[float]) -> str:
    shown = [f"{value:.3g}" for value in values[:4]] + ["..."] * (len(values) > 4)
    return "/".join(shown)


def _sigma_data(numbers: Tensor, process: Process) -> Finding:
    measured, set_to = float(numbers.std()), process.sigma_data
    ratio = measured / set_to
    values = {"measured": measured, "set": set_to}
    text = f"the standard deviation of x_0 is {measured:.3g}, and process.sigma_data is {set_to:g}"
    if 0.8 <= ratio <= 1.25:
        return Finding("sigma_data", "ok", f"{text}.", values)
    is_unbounded = process.high == torch.inf
    remedy = ", or the scaling factor of the VAE is wrong" if is_unbounded else ""
    return Finding(
        "sigma_data",
        "warning" if 0.5 <= ratio <= 2 else "wrong",
        f"{text}: set process.sigma_data: {measured:.2g}{remedy}.",
        values,
    )


def _duplicates(sample: DataSample) -> Finding:
    """Items of equal content, by their hash."""
    name = "duplicates"
    digests = (hashlib.sha256(x0.contiguous().numpy().tobytes()).digest() for x0 in sample.x0)
    pairs = find_repeats(digests, sample.indices)
    count = len(sample.indices)
    if not pairs:
        return Finding(name, "ok", f"the {count} items that were read differ.", {"pairs": []})
    listed = ", ".join(f"{a} and {b}" for a, b in pairs[:LISTED])
    share = len(pairs) / count
    return Finding(
        name,
        "wrong" if share > 0.5 else "warning",
        f"{len(pairs)} of {count} items ({share:.0%}) repeat another one, such as {listed}: remove "
        "them, because the network learns repeated items by heart.",
        {"pairs": pairs},
    )


def find_repeats(digests: Iterable[bytes], names: Iterable[T]) -> list[tuple[T, T]]:
    """Pair each item that repeats another one with the first of its content.

    Args:
        digests: hash of the content of each item.
        names: name or index of each item.

    Returns:
        (first, repetition) for each repetition, in order.
    """
    first: dict[bytes, T] = {}
    pairs = [(first.setdefault(digest, n), n) for digest, n in zip(digests, names, strict=True)]
    return [(original, name) for original, name in pairs if original != name]


def check_labels(labels: Sequence[int], process: Process, names: Sequence[str]) -> list[Finding]:
    """Check the number of items of each class.

    Args:
        labels: labels of all items, or of those that were read.
        process: process with its number of classes.
        names: names of the classes or captions; () if unknown.

    Returns:
        One finding, or none if the process has no classes.
    """
    if not process.classes or not labels:
        return []
    counts = Counter(labels)
    sizes = {label: counts.get(label, 0) for label in range(process.classes)}
    empty = [label for label, size in sizes.items() if not size]
    smallest, largest = min(sizes.values()), max(sizes.values())
    values = {"counts": list(sizes.values())}
    text = f"{process.classes} classes with {smallest} to {largest} items each"
    shown = ", ".join(_label(label, names) for label in empty[:LISTED])
    if empty:
        return [
            Finding(
                "labels",
                "wrong",
                f"{len(empty)} of {process.classes} classes have no items, such as {shown}: the "
                "network cannot learn them; set process.classes to the number that exists, or add "
                "items.",
                values,
            )
        ]
    rare = [label for label, size in sizes.items() if size < RARE]
    if rare or largest > IMBALANCE * smallest:
        least = min(sizes, key=lambda label: sizes[label])
        return [
            Finding(
                "labels",
                "warning",
                f"{text}; {len(rare)} have fewer than {RARE}, and the rarest is "
                f"{_label(least, names)} with {smallest}: samples of rare classes are worse; add "
                "items, or join classes.",
                values,
            )
        ]
    return [Finding("labels", "ok", f"{text}.", values)]


def _label(label: int, names: Sequence[str]) -> str:
    return f"{label} ({names[label][:40]})" if label < len(names) else str(label)
