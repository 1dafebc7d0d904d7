"""CFG-Zero*: guidance of the velocity with a fitted multiple of the reference, and zero-init."""

from dataclasses import dataclass

import torch

from diffcore.core.prediction import Prediction, dot_per_sample, predict, target
from diffcore.guidance.base import Contrast, GuidanceInput, Step
from diffcore.guidance.reference import Reference

__all__ = ["CFGZeroStar"]


@dataclass(frozen=True)
class CFGZeroStar(Contrast[None]):
    """CFG-Zero* guides the velocity v = ε - x_0 away from the best multiple of the reference's.

        v = s* v_ref + w (v_c - s* v_ref),   s* = ⟨v_c, v_ref⟩ / ‖v_ref‖² of each sample
        v = 0 in the first `zero_init` steps

    Source: Fan et al. 2025 (2503.18886, Algorithm 1). s* makes the reference the best multiple for
    the conditional velocity. A step with v = 0 leaves z = x/(α+σ) unchanged; it costs one
    evaluation, whose result is not used. Published code zeroes the first step (Stable Diffusion 3)
    or the first two (Wan). After those steps w = 1 is the conditional model, at one evaluation.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        reference: prediction to extrapolate away from; by default the unconditional one.
        zero_init: number of steps at the start of the run in which v is 0; 0 for none.
    """

    zero_init: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_init < 0:
            raise ValueError(
                f"zero_init is {self.zero_init}, expected a number of first steps, 0 for none"
            )

    @property
    def has_zero_init(self) -> bool:
        return self.zero_init > 0

    def required_references(self, step: Step, memory: None) -> tuple[Reference, ...]:
        return () if step.index < self.zero_init else super().required_references(step, memory)

    def combine(self, inputs: GuidanceInput, memory: None) -> tuple[Prediction, None]:
        x, step = inputs.x, inputs.step
        if step.index < self.zero_init:
            return predict("flow_prediction", torch.zeros_like(x), x, step.level, 1.0), memory
        return super().combine(inputs, memory)

    def extrapolate(
        self, inputs: GuidanceInput, reference: Prediction, scale: float, memory: None
    ) -> tuple[Prediction, None]:
        level = inputs.step.level
        v, v_ref = (
            target("flow_prediction", *p.pair, level, 1.0) for p in (inputs.conditional, reference)
        )
        # 0/0 where v_ref is 0: any multiple fits, and 0 is taken.
        s = (dot_per_sample(v, v_ref) / dot_per_sample(v_ref, v_ref)).nan_to_num(0.0, 0.0, 0.0)
        fit = s * v_ref
        return predict("flow_prediction", fit + scale * (v - fit), inputs.x, level, 1.0), memory
