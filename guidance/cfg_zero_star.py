"""CFG-Zero*: guidance of a velocity whose reference is scaled to fit, and which starts at rest."""

from dataclasses import dataclass
from typing import Any

import torch

from diffcore.core.prediction import Prediction, predict, target
from diffcore.guidance.base import Contrast, GuidanceInput, Step, dot
from diffcore.guidance.reference import Reference


@dataclass(frozen=True)
class CFGZeroStar(Contrast):
    """v = s* v_ref + w (v_c - s* v_ref),   s* = ⟨v_c, v_ref⟩ / ‖v_ref‖² of a row,   v = ε - x_0;   v = 0 in the first steps.

    Fan et al. 2025 (2503.18886, Algorithm 1): s* makes the reference the best multiple for the conditional velocity. A
    step with v = 0 stays where it is in z = x/(α+σ); it costs one evaluation, which nothing uses. Published code zeroes
    the first step (Stable Diffusion 3) or the first two (Wan). w = 1 is the conditional model after those steps, at one
    evaluation.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        reference: what to move away from.
        zero_init: number of first steps of the run that stand still.
    """

    zero_init: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_init < 0:
            raise ValueError(
                f"zero_init is {self.zero_init}, expected a number of first steps, 0 for none"
            )

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return () if step.index < self.zero_init else super().required_references(step, memory)

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        if seen.step.index < self.zero_init:
            return predict(
                "flow_prediction", torch.zeros_like(seen.x), seen.x, seen.step.level, 1.0
            ), memory
        return super().combine(seen, memory)

    def extrapolate(
        self, seen: GuidanceInput, reference: Prediction, scale: float, memory: Any
    ) -> tuple[Prediction, Any]:
        level = seen.step.level
        v, v_ref = (
            target("flow_prediction", *pair, level, 1.0) for pair in (seen.conditional, reference)
        )
        fit = (dot(v, v_ref) / dot(v_ref, v_ref)).nan_to_num(0.0, 0.0, 0.0) * v_ref
        return predict("flow_prediction", fit + scale * (v - fit), seen.x, level, 1.0), memory
