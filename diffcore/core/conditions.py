"""Named conditions of a network: vectors, embeddings and images beside the class label.

A process records each condition by name: the shape and range of its value, the share of training
samples without it, and the value that then takes its place. The class label (or the prompt) is the
condition `label`, whose absent value is the null label.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffcore.core.process import Process

__all__ = [
    "LABEL",
    "AbsentValue",
    "BatchCondition",
    "ConditionRecord",
    "Conditions",
    "as_conditions",
    "batch_condition",
    "concatenate",
    "condition_arguments",
    "drop",
    "labels_of",
    "null_condition",
    "replace_label",
    "without",
]

LABEL = "label"
"""Name of the class label among the conditions."""
RESERVED = (LABEL, "weight", "self", "x", "time", "timestep", "sample", "return_dict")
"""Names that a condition cannot have: those of other arguments, and of the weight of an item."""

AbsentValue = Literal["zeros", "null", "learned"]


@dataclass(frozen=True)
class ConditionRecord:
    """What a process records of one named condition.

    Args:
        shape: shape of the value of one sample: (d,) for a vector, (tokens, d) for an embedding,
            (C, H, W) for an image.
        low: lower end of the range of the numbers; -inf, the default, is unbounded.
        high: upper end of the range of the numbers; inf, the default, is unbounded.
        dropout: share of training samples without this condition, in [0, 1]. Each condition is
            dropped independently of the others.
        absent: value of a dropped condition: zeros, null (the numbers of `null`), or learned (the
            network receives zeros, and the flags `NAME_absent` (B,), by which it puts a learned
            value in their place). With null and dropout 0, `null` is the default value: that of
            samples and data items for which no value is given.
        null: numbers of the null value: one number for all elements, or the elements in row-major
            order; only for absent: null.

    Raises:
        ValueError: a field is out of range, or `null` does not fit.
    """

    shape: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf
    dropout: float = 0.0
    absent: AbsentValue = "zeros"
    null: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "null", tuple(self.null))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"the shape of a condition is {self.shape}, expected the positive sizes of one "
                "value, such as (1,) for a number or (3, 32, 32) for an image"
            )
        if not self.low < self.high:
            raise ValueError(
                f"low and high of a condition are {self.low} and {self.high}, expected low < high"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(
                f"the dropout of a condition is {self.dropout}, expected a probability in [0, 1]"
            )
        if self.absent not in get_args(AbsentValue):
            raise ValueError(f"absent is {self.absent!r}, expected zeros, null or learned")
        self._check_null()

    def _check_null(self) -> None:
        if self.absent != "null":
            if self.null:
                raise ValueError(
                    f"null has {len(self.null)} numbers, but absent is {self.absent}: leave null "
                    "out, or set absent: null"
                )
            return
        if len(self.null) not in (1, math.prod(self.shape)):
            raise ValueError(
                f"null has {len(self.null)} numbers, expected 1, or {math.prod(self.shape)} for "
                f"the shape {self.shape}"
            )
        if not all(map(math.isfinite, self.null)):
            raise ValueError("null has numbers that are not finite, expected finite ones")

    @property
    def has_default(self) -> bool:
        """Whether `null` is the value of samples for which none is given."""
        return self.absent == "null" and not self.dropout

    def default(self) -> Tensor:
        """The value `null`, float32 of the shape of one value on the host."""
        null = torch.tensor(self.null)
        return null.reshape(self.shape) if len(null) > 1 else null.expand(self.shape)

    def resized(
        self, name: str, before: tuple[int, ...], after: tuple[int, ...]
    ) -> "ConditionRecord":
        """The record for samples of another size.

        A condition (c, h, w) whose sides have one ratio to those of x_0 (C, H, W) is an image of
        x_0, and keeps this ratio. Other conditions keep their shapes.

        Args:
            name: name of the condition in messages.
            before: shape of x_0 for which this record is.
            after: shape of x_0 of the result.

        Returns:
            The record.

        Raises:
            ValueError: a side would not be a whole number, or the null value has one number for
                each element.
        """
        if not len(self.shape) == len(before) == len(after) == 3:
            return self
        ratio, other = (Fraction(self.shape[axis], before[axis]) for axis in (1, 2))
        if ratio != other or before == after:
            return self
        sides = [side * ratio for side in after[1:]]
        if len(self.null) > 1 or any(side.denominator > 1 for side in sides):
            number = "its null value has one number for each element"
            reason = number if len(self.null) > 1 else f"its sides are {ratio} of theirs"
            raise ValueError(
                f"the condition {name} of shape {self.shape} has no size for images of "
                f"{after[1]} x {after[2]}, because {reason}: use sizes that fit, or a null value "
                "of one number"
            )
        return replace_field(self, shape=(self.shape[0], *map(int, sides)))

    def fill(self, value: Tensor, mask: Tensor) -> Tensor:
        """Put the absent value into some rows.

        Args:
            value: values (B, *shape).
            mask: rows (B,) whose condition is absent, on the device of the values.

        Returns:
            Values (B, *shape).
        """
        rows = mask.view(-1, *[1] * len(self.shape))
        if len(self.null) <= 1:
            return value.masked_fill(rows, self.null[0] if self.null else 0.0)
        null = torch.tensor(self.null, dtype=value.dtype).reshape(self.shape)
        return torch.where(rows, null.to(value.device, non_blocking=True), value)


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of B samples of a process that has named conditions.

    Args:
        values: name -> (B, *shape), of which absent rows hold the absent value; also inputs of the
            network that are no conditions of the process, such as the sizes of images.
        absent: name -> (B,), True for rows in which the condition is absent.
        label: class labels (B,), the null label included; None if the process has no classes.
    """

    values: Mapping[str, Tensor]
    absent: Mapping[str, Tensor]
    label: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples, B."""
        return len(next(iter(self.values.values())))

    def __getitem__(self, rows: Tensor) -> "Conditions":
        """The conditions of some samples, in the order of `rows` (an index or a mask)."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Conditions":
        """The same conditions on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        return Conditions(
            {name: change(value) for name, value in self.values.items()},
            {name: change(mask) for name, mask in self.absent.items()},
            None if self.label is None else change(self.label),
        )


BatchCondition = Tensor | Conditions
"""The condition of B samples: class labels (B,), or `Conditions` if the process has named ones."""


def null_condition(
    process: "Process", batch_size: int, device: torch.device | None = None
) -> BatchCondition | None:
    """The absent value of every condition: the null label, and that of each named condition.

    Args:
        process: process of the network.
        batch_size: number of samples.
        device: device of the result; the host by default.

    Returns:
        Labels (batch_size,), or `Conditions` if the process has named ones; None if the process has
        no condition.
    """
    label = _null_label(process, batch_size, device)
    if not process.conditions:
        return label
    zeros = {
        name: torch.zeros(batch_size, *record.shape, device=device)
        for name, record in process.conditions.items()
    }
    all_rows = torch.ones(batch_size, dtype=torch.bool, device=device)
    given = Conditions(zeros, dict.fromkeys(zeros, ~all_rows), label)
    return drop(process, given, dict.fromkeys(zeros, all_rows))


def as_conditions(
    process: "Process",
    condition: BatchCondition | None,
    batch_size: int,
    device: torch.device | None = None,
) -> BatchCondition | None:
    """The condition in the form that a process has; what it lacks is absent.

    Args:
        process: process of the network.
        condition: labels (B,), `Conditions`, or None.
        batch_size: number of samples, B.
        device: device of what is added; the host by default.

    Returns:
        `Conditions` if the process has named ones, else labels; None if it has no condition.
    """
    if condition is None:
        return null_condition(process, batch_size, device)
    if not process.conditions:
        return condition
    if not isinstance(condition, Conditions):
        return replace_label(null_condition(process, batch_size, device), condition)
    if condition.label is not None:
        return condition
    return replace_label(condition, _null_label(process, batch_size, device))


def _null_label(process: "Process", count: int, device: torch.device | None) -> Tensor | None:
    return torch.full((count,), process.classes, device=device) if process.classes else None


def batch_condition(
    process: "Process",
    label: Tensor,
    values: Mapping[str, Tensor],
    device: torch.device | None = None,
    inputs: Iterable[str] = (),
) -> BatchCondition | None:
    """The condition of a batch of data items, of which each has all conditions.

    Args:
        process: process of the network.
        label: class labels (B,), which a process without classes ignores.
        values: name -> (B, *shape), one for each condition of the process and each input.
        device: device of the result; the host by default.
        inputs: names of further values, which the network receives unchanged (`DataSource.inputs`).

    Returns:
        Labels (B,), `Conditions`, or None if the process has no condition and there are no inputs.
    """
    labels = label.to(device, non_blocking=True) if process.classes else None
    names = [*process.conditions, *inputs]
    if not names:
        return labels
    moved = {name: values[name].to(device, non_blocking=True) for name in names}
    present = torch.zeros(len(label), dtype=torch.bool, device=device)
    return Conditions(moved, dict.fromkeys(moved, present), labels)


def drop(
    process: "Process", condition: BatchCondition, masks: Mapping[str, Tensor]
) -> BatchCondition:
    """Replace conditions of some samples by their absent values.

    Args:
        process: process of the network.
        condition: conditions of B samples.
        masks: name of a condition -> (B,), True where it is dropped; `label` names the class label.

    Returns:
        The conditions of B samples, of the form of `condition`.
    """
    if isinstance(condition, Tensor):
        mask = masks.get(LABEL)
        return condition if mask is None else condition.masked_fill(mask, process.classes)
    values, absent, label = dict(condition.values), dict(condition.absent), condition.label
    for name, mask in masks.items():
        if name != LABEL:
            values[name] = process.conditions[name].fill(values[name], mask)
            absent[name] = absent[name] | mask
        elif label is not None:
            label = label.masked_fill(mask, process.classes)
    return Conditions(values, absent, label)


def without(process: "Process", condition: BatchCondition, names: Sequence[str]) -> BatchCondition:
    """Replace conditions of all samples by their absent values.

    Args:
        process: process of the network.
        condition: conditions of B samples.
        names: names of the conditions; `label` names the class label.

    Returns:
        The conditions of B samples, of the form of `condition`.
    """
    reference = (
        condition if isinstance(condition, Tensor) else next(iter(condition.absent.values()))
    )
    mask = torch.ones(len(condition), dtype=torch.bool, device=reference.device)
    return drop(process, condition, dict.fromkeys(names, mask))


def labels_of(condition: BatchCondition | None) -> Tensor | None:
    """The class labels (B,) among the conditions, or None without them."""
    return condition.label if isinstance(condition, Conditions) else condition


def replace_label(condition: BatchCondition | None, label: Tensor | None) -> BatchCondition | None:
    """The conditions with another class label (B,); named conditions are kept."""
    return replace_field(condition, label=label) if isinstance(condition, Conditions) else label


def concatenate(parts: Sequence[BatchCondition]) -> BatchCondition:
    """The conditions of several batches, which have one form and one device, as one batch.

    Args:
        parts: labels of each batch, or `Conditions` of each batch.

    Returns:
        The conditions of all samples, in order.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    named = [part for part in parts if isinstance(part, Conditions)]
    labels = [part.label for part in named if part.label is not None]
    return Conditions(
        {name: torch.cat([part.values[name] for part in named]) for name in first.values},
        {name: torch.cat([part.absent[name] for part in named]) for name in first.absent},
        torch.cat(labels) if labels else None,
    )


def condition_arguments(
    process: "Process", condition: BatchCondition | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The keyword arguments by which a network receives its conditions.

    Args:
        process: process of the network.
        condition: conditions of B samples; None if the process has none.
        dtype: dtype of the values of named conditions.

    Returns:
        `class_labels` (B,) if the process has classes; the value (B, *shape) of each named
        condition under its name; `NAME_absent` (B,) if its absent value is learned; and inputs
        that are no conditions of the process, in their own dtype.
    """
    arguments: dict[str, Tensor] = {}
    label = labels_of(condition)
    if label is not None and (process.classes or isinstance(condition, Tensor)):
        arguments["class_labels"] = label
    if isinstance(condition, Conditions):
        arguments |= condition.values
        for name, record in process.conditions.items():
            arguments[name] = condition.values[name].to(dtype)
            if record.absent == "learned":
                arguments[f"{name}_absent"] = condition.absent[name]
    return arguments
