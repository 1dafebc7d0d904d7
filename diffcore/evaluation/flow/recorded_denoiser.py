"""A denoiser that records evaluations, so that they are not repeated.

A change of the last steps of a sampler leaves the evaluations of the first steps as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, Conditions
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["RecordedDenoiser"]


class _Entry(NamedTuple):
    """An evaluation.

    Args:
        x: input of the network.
        condition: condition of the samples.
        prediction: the prediction.
    """

    x: Tensor
    condition: BatchCondition | None
    prediction: Prediction


class RecordedDenoiser(DenoiserWrapper):
    """A denoiser whose recorded evaluations are not repeated, for equal x, level and condition.

    Args:
        inner: denoiser that is evaluated.
    """

    def __init__(self, inner: DenoiserProtocol) -> None:
        super().__init__(inner)
        self._entries: dict[float, list[_Entry]] = {}
        self._is_recording = False
        self.evaluated = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forget the recorded evaluations, and record those within the context.

        Returns:
            A context manager.
        """
        self._entries, self._is_recording = {}, True
        try:
            yield
        finally:
            self._is_recording = False

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        if isinstance(level.logsnr, Tensor):
            return self.inner(x, level, condition)
        entries = self._entries.setdefault(float(level.logsnr), [])
        for entry in entries:
            if _is_equal(entry.condition, condition) and torch.equal(entry.x, x):
                return entry.prediction
        prediction = self.inner(x, level, condition)
        self.evaluated += 1
        if self._is_recording:
            entries.append(_Entry(x, condition, prediction))
        return prediction


def _is_equal(condition: BatchCondition | None, other: BatchCondition | None) -> bool:
    """Whether two conditions are equal."""
    if isinstance(condition, Tensor) and isinstance(other, Tensor):
        return torch.equal(condition, other)
    if isinstance(condition, Conditions) and isinstance(other, Conditions):
        own, others = _tensors(condition), _tensors(other)
        return own.keys() == others.keys() and all(
            torch.equal(own[name], others[name]) for name in own
        )
    return condition is other


def _tensors(condition: Conditions) -> dict[str, Tensor]:
    """All tensors of a condition by a name."""
    parts = {"values": condition.values, "absent": condition.absent}
    if condition.label is not None:
        parts["label"] = {"": condition.label}
    return {f"{part} {name}": x for part, named in parts.items() for name, x in named.items()}
