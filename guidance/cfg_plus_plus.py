"""CFG++: guidance that renoises with the reference's noise."""

from dataclasses import dataclass
from typing import Any

from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Guidance, GuidanceInput, Step, extrapolated
from diffcore.guidance.reference import Reference, Unconditional, check_reference
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at


@dataclass(frozen=True)
class CFGPlusPlus(Guidance):
    """x_s = α_s (x_0,ref + w (x_0,c - x_0,ref)) + σ_s ε_ref: step towards the guided x_0, renoise with the reference's ε.

    Chung et al. 2024 (2406.08070, Algorithm 2); w = 0.6 is used where CFG has 7.5. w = 0 is the unconditional first-order
    step; w = 1 steps to the conditional x_0 and is not the conditional model. Its pair breaks x = α x_0 + σ ε, so it has no
    limit of small steps and is for first-order samplers only: a step from u to u' is CFG's with w' = w u/(u - u').

    Args:
        scale: w within [0, 1]: a number, a scale schedule, or in Python any function of λ.
        reference: what to renoise with.
    """

    scale: ScaleLike = 0.6
    reference: Reference = Unconditional()
    consistent = False

    def __post_init__(self) -> None:
        check_reference(self.reference)
        if isinstance(self.scale, (int, float)):
            _check(self.scale)
        else:
            check_scale(self.scale)

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        _check(scale_at(self.scale, step.level))
        return (self.reference,)

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        if not seen.references:  # a rule around this one switched it off
            return seen.conditional, memory
        (reference,) = seen.references
        w = scale_at(self.scale, seen.step.level)
        return Prediction(extrapolated(reference, seen.conditional, w).x0, reference.eps), memory


def _check(scale: float) -> None:
    if not 0 <= scale <= 1:
        raise ValueError(
            f"scale is {scale}, expected w within [0, 1]: CFG++ interpolates, and 0.6 is like a CFG of 7.5"
        )
