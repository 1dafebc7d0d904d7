"""A denoiser that records evaluations, so that they are not repeated.

A change of the last steps of a sampler leaves the evaluations of the first steps as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.condition_values import are_equal
from diffcore.core.conditions import BatchCondition
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
            if are_equal(entry.condition, condition) and torch.equal(entry.x, x):
                return entry.prediction
        prediction = self.inner(x, level, condition)
        self.evaluated += 1
        if self._is_recording:
            entries.append(_Entry(x, condition, prediction))
        return prediction
