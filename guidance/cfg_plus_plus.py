"""CFG++: guidance that renoises with the reference's ε."""

from dataclasses import dataclass

from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Guidance, GuidanceInput, Step
from diffcore.guidance.cfg import extrapolate_linearly
from diffcore.guidance.reference import Reference, Unconditional, check_reference
from diffcore.guidance.scale import ScaleLike, check_scale, is_number, scale_at

__all__ = ["CFGPlusPlus"]


@dataclass(frozen=True)
class CFGPlusPlus(Guidance[None]):
    """CFG++ steps towards the guided x_0 and renoises with the reference's ε.

        x_s = α_s (x_0,ref + w (x_0,c - x_0,ref)) + σ_s ε_ref

    Source: Chung et al. 2024 (2406.08070, Algorithm 2); w = 0.6 is used where CFG has 7.5.
    w = 0 is the unconditional first-order step. w = 1 steps to the conditional x_0; it is not the
    conditional model. The pair breaks x = α x_0 + σ ε, so it has no limit of small steps and is
    for first-order samplers only: a step from u = σ/α to u' is a step of CFG with
    w' = w u/(u - u').

    Args:
        scale: w within [0, 1]: a number, a scale schedule, or in Python any function of λ.
        reference: prediction that supplies ε; by default the unconditional one.
    """

    scale: ScaleLike = 0.6
    reference: Reference = Unconditional()

    def __post_init__(self) -> None:
        check_reference(self.reference)
        if is_number(self.scale):
            _check_interpolates(self.scale)
        else:
            check_scale(self.scale)

    @property
    def is_consistent(self) -> bool:
        return False

    def required_references(self, step: Step, memory: None) -> tuple[Reference, ...]:
        _check_interpolates(scale_at(self.scale, step.level))
        return (self.reference,)

    def combine(self, inputs: GuidanceInput, memory: None) -> tuple[Prediction, None]:
        if not inputs.references:  # a wrapper has omitted the reference
            return inputs.conditional, memory
        (reference,) = inputs.references
        w = scale_at(self.scale, inputs.step.level)
        guided = extrapolate_linearly(reference, inputs.conditional, w)
        return Prediction(guided.x0, reference.eps), memory


def _check_interpolates(scale: float) -> None:
    """Raise ValueError unless 0 ≤ w ≤ 1."""
    if not 0 <= scale <= 1:
        raise ValueError(
            f"scale is {scale}, expected w within [0, 1]: CFG++ interpolates, and 0.6 is like a "
            "CFG of 7.5"
        )
