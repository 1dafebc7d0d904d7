"""Values of named conditions: their check, their defaults, and those that are drawn.

guidance_scale   w of the guidance that a network was distilled from; drawn in training
seed_bytes       seed of what is random in a network; drawn in training, filled by sampling
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffcore.core.conditions import (
    BatchCondition,
    ConditionRecord,
    Conditions,
    null_condition,
)
from diffcore.core.process import Process
from diffcore.core.random import Stream, words

__all__ = [
    "GUIDANCE_SCALE",
    "SEED_BYTES",
    "are_equal",
    "check_guidance_range",
    "check_value",
    "draw_seeds",
    "process_without",
    "resolve",
    "seed_bytes",
    "seeds_of_bytes",
    "with_seeds",
    "without_value",
]

GUIDANCE_SCALE = "guidance_scale"
"""Name of the condition by which a distilled network receives the scale w of guidance."""
SEED_BYTES = "seed_bytes"
"""Name of the condition by which a network with random inputs receives the seed of each sample."""


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


def seed_bytes(seeds: Tensor) -> Tensor:
    """The bytes of seeds as numbers, which every floating-point type represents exactly.

    Args:
        seeds: (B,) 64-bit seeds.

    Returns:
        (B, 8) float32 numbers from 0 to 255, the lowest byte first.

    Example:
        >>> seed_bytes(torch.tensor([258])).int().tolist()
        [[2, 1, 0, 0, 0, 0, 0, 0]]
    """
    return ((seeds[:, None] >> 8 * torch.arange(8, device=seeds.device)) & 0xFF).float()


def seeds_of_bytes(numbers: Tensor) -> Tensor:
    """The seeds (B,) of their bytes (B, 8), the inverse of `seed_bytes`.

    Args:
        numbers: numbers from 0 to 255.

    Returns:
        int64 seeds, on the device of the numbers.
    """
    return (numbers.long() << 8 * torch.arange(8, device=numbers.device)).sum(1)


def with_seeds(
    process: Process, condition: BatchCondition | None, seeds: Sequence[int] | Tensor
) -> BatchCondition | None:
    """The conditions with the seeds of the samples, if the network receives them.

    Args:
        process: process of the network.
        condition: conditions of B samples.
        seeds: 64-bit seeds, one for each of the B samples.

    Returns:
        `condition` itself if the process has no condition `seed_bytes`.
    """
    if SEED_BYTES not in process.conditions or not isinstance(condition, Conditions):
        return condition
    numbers = seed_bytes(torch.tensor([int(seed) for seed in seeds]))
    values = {**condition.values, SEED_BYTES: numbers}
    return replace(condition, values=values)


def draw_seeds(process: Process, seed: int, position: Tensor) -> Mapping[str, Tensor]:
    """The seeds of samples in training, if the network receives them.

    Args:
        process: process of the network.
        seed: 64-bit seed of the run.
        position: (B,) position of each sample in the run.

    Returns:
        `seed_bytes` -> (B, 8); empty if the process has no such condition.
    """
    if SEED_BYTES not in process.conditions:
        return {}
    high, low = words(seed, Stream.INPUT_SEED, position, 2).unbind(1)
    return {SEED_BYTES: seed_bytes((high << 32) | low)}


def without_value(condition: BatchCondition | None, name: str) -> BatchCondition | None:
    """The conditions of a process that lacks a named condition.

    Args:
        condition: conditions of B samples.
        name: name of the condition that is removed.

    Returns:
        `Conditions` without the name; the labels, or None, if there are no others.
    """
    if not isinstance(condition, Conditions) or name not in condition.values:
        return condition
    values = {key: value for key, value in condition.values.items() if key != name}
    absent = {key: mask for key, mask in condition.absent.items() if key != name}
    return Conditions(values, absent, condition.label) if values else condition.label


def check_guidance_range(low: float, high: float) -> None:
    """Check the interval of a scale w of guidance that is drawn for each sample.

    Args:
        low: smallest w.
        high: largest w.

    Raises:
        ValueError: the interval is empty, infinite or below 0.
    """
    if not 0 <= low < high < math.inf:
        raise ValueError(
            f"guidance_range is {low:g},{high:g}, expected finite w with 0 <= low < high"
        )


def process_without(process: Process, name: str) -> Process:
    """The process of a network that does not receive a named condition.

    Args:
        process: process with or without the condition.
        name: name of the condition.

    Returns:
        The process without it.
    """
    rest = {key: record for key, record in process.conditions.items() if key != name}
    return replace(process, conditions=rest)


def are_equal(a: BatchCondition | None, b: BatchCondition | None) -> bool:
    """Whether two conditions are equal; on an accelerator, this waits for it.

    Args:
        a: conditions of some samples.
        b: conditions of as many samples.

    Returns:
        True if labels, values and absences are.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if not (isinstance(a, Conditions) and isinstance(b, Conditions)):
        return False
    if a.values.keys() != b.values.keys() or not are_equal(a.label, b.label):
        return False
    return all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in ((a.values, b.values), (a.absent, b.absent))
        for name in ours
    )


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
