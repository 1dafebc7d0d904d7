"""Classifier-free guidance."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcore.guidance.base import Guidance
from diffcore.prediction import Prediction
from diffcore.schedules import Level


@dataclass(frozen=True)
class CFG(Guidance):
    """D = D_ref + w (D_cond - D_ref), on x_0 and on ε alike (the rule is affine, so x = α x_0 + σ ε still holds).

    Ho & Salimans 2022 (2207.12598, eq. 6), whose w is ours less 1. w = 1 is the conditional model bit for bit, at one
    evaluation.

    Args:
        scale: w ≥ 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}, expected a finite w ≥ 0 (1 is the conditional model)")

    @property
    def uses_reference(self) -> bool:
        return self.scale != 1

    def combine(
        self, conditional: Prediction, reference: Prediction, x: Tensor, level: Level, memory: Any
    ) -> tuple[Prediction, Any]:
        x0 = reference.x0 + self.scale * (conditional.x0 - reference.x0)
        eps = reference.eps + self.scale * (conditional.eps - reference.eps)
        return Prediction(x0, eps), memory
