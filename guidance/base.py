"""Guidance: a rule that combines the conditional prediction with a reference, the same network without the condition.

One convention for the scale: guided = reference + w (conditional - reference); w = 1 is the conditional model, w = 0 the
reference. A rule says on the host, before the step, whether it needs the reference at all.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from diffcore.prediction import Prediction
from diffcore.schedules import Level


class Guidance(ABC):
    """A rule (conditional, reference) -> guided. Immutable: what it remembers of a run is passed in and out."""

    @property
    @abstractmethod
    def uses_reference(self) -> bool:
        """Whether any level needs the reference; False is the conditional model."""

    def needs_reference(self, level: Level, memory: Any) -> bool:
        """Whether the reference is needed at this level; without it a step costs one evaluation."""
        return self.uses_reference

    @abstractmethod
    def combine(
        self, conditional: Prediction, reference: Prediction, x: Tensor, level: Level, memory: Any
    ) -> tuple[Prediction, Any]:
        """The guided x_0 to step towards and ε to renoise with, and the rule's memory after this step."""
