"""Values of named conditions from a caller or a data set: their check, and their defaults."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore.core.conditions import ConditionRecord, Conditions, null_condition
from diffcore.core.process import Process

__all__ = ["check_value", "resolve"]


def check_value(
    name: str, record: ConditionRecord, value: Any, where: str, may_be_several: bool = False
) -> Tensor:
    """Check the values of a condition.

    Args:
        name: name of the condition.
        record: what the process records of it.
        value: one value of the record's shape.
        where: what has the value, such as "item 3 of the data", for the message.
        may_be_several: whether several values (N, *shape) are accepted too.

    Returns:
        The values as a float tensor of at least 32 bits.

    Raises:
        ValueError: the value is no tensor of finite numbers of this shape within the range.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    is_several = may_be_several and len(shape) > 1 and shape[1:] == record.shape and shape[0] != 0
    is_fitting = shape == record.shape or is_several
    if not isinstance(value, Tensor) or value.is_complex() or not is_fitting:
        raise ValueError(
            f"{where} has the condition {name} of shape {shape}, expected a tensor of the shape "
            f"{record.shape} of the process"
        )
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    low, high = (float(bound) for bound in value.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{where} has the condition {name} with values that are not finite (NaN or infinite): "
            "repair or remove it"
        )
    if low < record.low - 1e-6 or high > record.high + 1e-6:
        raise ValueError(
            f"{where} has the condition {name} in [{low:g}, {high:g}], expected within the range "
            f"[{record.low:g}, {record.high:g}] of the process: scale it as in training"
        )
    return value


def resolve(
    process: Process, count: int, given: Mapping[str, Any], label: Tensor | None
) -> Conditions:
    """The conditions of samples from values that a caller names.

    Args:
        process: process of the network, which has named conditions.
        count: number of samples, N.
        given: name -> values (N, *shape), or one value (*shape) for all samples. A condition that
            is left out has its default value, or is absent.
        label: class labels (N,); None: the null label.

    Returns:
        `Conditions` of N samples, on the host.

    Raises:
        ValueError: a name is unknown, a value does not fit, or a condition is left out that the
            network always had in training.
    """
    unknown = sorted(set(given) - set(process.conditions))
    if unknown:
        names = ", ".join(process.conditions)
        raise ValueError(f"there is no condition {unknown[0]!r}, expected {names}")
    base = null_condition(process, count)
    assert isinstance(base, Conditions)
    values, absent = dict(base.values), dict(base.absent)
    for name, record in process.conditions.items():
        if given.get(name) is None:
            _check_droppable(name, record)
            continue
        value = check_value(name, record, _as_tensor(given[name]), "the request", True)
        if value.ndim > len(record.shape) and len(value) not in (1, count):
            raise ValueError(
                f"condition {name} has {len(value)} values, expected one for each of {count} "
                "samples, or one for all"
            )
        values[name] = value.expand(count, *record.shape)
        absent[name] = torch.zeros(count, dtype=torch.bool)
    return Conditions(values, absent, base.label if label is None else label)


def _as_tensor(value: Any) -> Any:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value  # `check_value` names its type


def _check_droppable(name: str, record: ConditionRecord) -> None:
    if not record.dropout and not record.has_default:
        raise ValueError(
            f"condition {name} is missing, without which the network was never trained: pass "
            f"values of shape {record.shape}"
        )
