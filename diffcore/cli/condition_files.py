"""Conditions that a command line names: files of arrays and images, and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.core.condition_values import check_value
from diffcore.core.conditions import LABEL, ConditionRecord
from diffcore.core.process import Process
from diffcore.guidance.reference import Condition
from diffcore.io.files import hash_file
from diffcore.sampling import images
from diffcore.sampling.files import SampleKey

__all__ = ["NamedValues"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class NamedValues:
    """The values of named conditions that a command line names.

    Args:
        values: name -> values (N, *shape); N is equal for all names of more than one value.
        settings: plain data on which samples depend: the hash of each file, or the numbers.
    """

    values: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, given: Mapping[str, str], process: Process) -> "NamedValues":
        """Read the values, and check them against the process.

        Args:
            given: name of a condition -> an image; an .npy file of one value or of several
                (N, *shape); a .safetensors file with such a tensor of the name of the condition; or
                numbers such as 0.5,-1. Integers in files are scaled as by `Arrays`, bytes of images
                to the range of the condition.
            process: process of the network.

        Returns:
            The values.

        Raises:
            ValueError: a name is unknown, a file cannot be read, or a value does not fit.
        """
        values = {name: _read(name, source, process) for name, source in given.items()}
        counts = {name: len(value) for name, value in values.items() if len(value) > 1}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"the conditions have {counts} values, expected equally many, or one for all "
                "samples"
            )
        described = {
            name: hash_file(Path(source)) if Path(source).is_file() else source
            for name, source in given.items()
        }
        return cls(values, {"conditions": described} if described else {})

    @property
    def count(self) -> int:
        """Number of values; 1 if the conditions have one for all samples, or are none."""
        return max((len(value) for value in self.values.values()), default=1)

    def condition(self, keys: Sequence[SampleKey], has_labels: bool) -> Condition:
        """The condition of samples, as `sample` expects it.

        Args:
            keys: labels of the samples, and indices of their values.
            has_labels: whether the samples have labels.

        Returns:
            The labels, or a table of values by name with the labels in it; None without either.
        """
        labels = [key.label for key in keys] if has_labels else None
        if not self.values:
            return labels
        rows = torch.tensor([key.row for key in keys])
        named = {
            name: value if len(value) == 1 else value[rows] for name, value in self.values.items()
        }
        return named | ({LABEL: labels} if labels else {})


def _read(name: str, source: str, process: Process) -> Tensor:
    """The values (N, *shape) of one condition."""
    if name not in process.conditions:
        known = ", ".join(process.conditions) or "none"
        raise ValueError(f"--condition.{name} was given, but the network has {known}: leave it out")
    record, path = process.conditions[name], Path(source)
    suffix = path.suffix.lower()
    if suffix in (".npy", ".safetensors"):
        value = _read_rows(path, name, suffix)
        value = value[None] if tuple(value.shape) == record.shape else value
    elif suffix in IMAGES:
        value = _read_image(path, name, record)[None]
    else:
        value = _read_numbers(name, source, record)[None]
    return check_value(name, record, value, f"--condition.{name}", True)


def _read_rows(path: Path, name: str, suffix: str) -> Tensor:
    """All rows of an array, or of the tensor of this name."""
    # Imported here because only few calls need it.
    from diffcore.training.data.arrays import Arrays, Tensors

    rows = Arrays(str(path)) if suffix == ".npy" else Tensors(str(path), name, "")
    return torch.stack([rows[index][0] for index in range(len(rows))])


def _read_image(path: Path, name: str, record: ConditionRecord) -> Tensor:
    """An image of the range of a condition, which is [-1, 1] if it is unbounded."""
    is_bounded = -torch.inf < record.low and record.high < torch.inf
    low, high = (record.low, record.high) if is_bounded else (-1.0, 1.0)
    if len(record.shape) != 3 or record.shape[0] not in (1, 3):
        raise ValueError(
            f"--condition.{name} is the image {path}, but values have the shape {record.shape}: "
            "pass an .npy file"
        )
    return images.load_image(path, Process(shape=record.shape, low=low, high=high))


def _read_numbers(name: str, source: str, record: ConditionRecord) -> Tensor:
    """The numbers of a vector, such as 0.5,-1."""
    try:
        numbers = torch.tensor([float(word) for word in source.strip("[]").split(",")])
    except ValueError:
        raise ValueError(
            f"--condition.{name} is {source!r}, expected an .npy or .safetensors file, an image, "
            "or numbers such as 0.5,-1"
        ) from None
    if len(numbers) != torch.Size(record.shape).numel():
        raise ValueError(
            f"--condition.{name} has {len(numbers)} numbers, expected those of a value of shape "
            f"{record.shape}: pass several values as an .npy file of shape "
            f"{('N', *record.shape)}".replace("'", "")
        )
    return numbers.reshape(record.shape)
