"""Conditions that are drawn: by sampling for each seed, by objectives for each sample.

guidance_scale   w of the guidance that a network was distilled from; drawn in training
seed_bytes       seed of what is random in a network; drawn in training, filled by sampling
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, Conditions
from diffcore.core.process import Process
from diffcore.core.random import Stream, words

__all__ = [
    "GUIDANCE_SCALE",
    "SEED_BYTES",
    "draw_seeds",
    "process_without",
    "seed_bytes",
    "seeds_of_bytes",
    "with_seeds",
    "without_value",
]

GUIDANCE_SCALE = "guidance_scale"
"""Name of the condition by which a distilled network receives the scale w of guidance."""
SEED_BYTES = "seed_bytes"
"""Name of the condition by which a network with random inputs receives the seed of each sample."""


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
    process: Process, condition: BatchCondition | None, seeds: Tensor
) -> BatchCondition | None:
    """The conditions with the seeds of the samples, if the network receives them.

    Args:
        process: process of the network.
        condition: conditions of B samples.
        seeds: (B,) 64-bit seeds.

    Returns:
        `condition` itself if the process has no condition `seed_bytes`.
    """
    if SEED_BYTES not in process.conditions or not isinstance(condition, Conditions):
        return condition
    values = {**condition.values, SEED_BYTES: seed_bytes(seeds)}
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
