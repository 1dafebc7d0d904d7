"""Guidance rescale: the guided output gets the standard deviation of the conditional output."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from diffcore.core.prediction import Prediction, PredictionType, predict
from diffcore.guidance.base import GuidanceInput, GuidanceWrapper, Step, check_space, outputs
from diffcore.guidance.reference import Reference

__all__ = ["Rescale"]


@dataclass(frozen=True)
class Rescale(GuidanceWrapper[Any]):
    """Guidance rescale shrinks the guided output F_g to the standard deviation of the conditional.

        F = φ F_g std(F_c)/std(F_g) + (1 - φ) F_g,   std over each sample

    Source: Lin et al. 2023 (2305.08891, section 3.4), who recommend φ = 0.7. F is the network's own
    output, as published, so the result depends on the prediction type unless `space` fixes F. A
    sample with std(F_g) = 0 stays unchanged. A prediction that the rule inside left unchanged stays
    unchanged too. The memory is that of the rule inside.

    Args:
        inner: rule whose guided prediction is rescaled.
        phi: φ within [0, 1]: 0 leaves the prediction unchanged, 1 rescales it in full.
        space: quantity F that is rescaled; None is the output of the network.
    """

    phi: float = 0.7
    space: PredictionType | None = None

    incompatible_rules: ClassVar[dict[str, str]] = {
        "Rescale": "its prediction is rescaled already; use one Rescale with a larger phi",
        "CFGPlusPlus": "its x_0 and ε do not belong together; use CFG, or CFGPlusPlus alone",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.phi <= 1:
            raise ValueError(f"phi is {self.phi}, expected a share within [0, 1]")
        if self.space is not None and self.space not in get_args(PredictionType):
            raise ValueError(
                f"space is {self.space!r}, expected one of {', '.join(get_args(PredictionType))}"
            )
        if self.inner.has_zero_init:
            raise ValueError(
                "Rescale cannot hold CFGZeroStar with zero_init above 0: its first steps have no "
                "velocity to rescale; use zero_init=0"
            )

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        references = self.inner.required_references(step, memory)
        if references:
            check_space(self, self.space or step.process.prediction, step.level)
        return references

    def combine(self, inputs: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        guided, memory = self.inner.combine(inputs, memory)
        if guided is inputs.conditional:
            return guided, memory
        process, level = inputs.step.process, inputs.step.level
        space = self.space or process.prediction
        check_space(self, space, level)  # needed here for classifiers, which have no reference
        F, F_c = outputs(space, inputs.step, guided, inputs.conditional)
        rescaled = F * (self.phi * _deviation_ratio(F_c, F) + 1 - self.phi)
        return predict(space, rescaled, inputs.x, level, process.sigma_data), memory


def _deviation_ratio(a: Tensor, b: Tensor) -> Tensor:
    """std(a)/std(b) of each sample, (B, 1, ..., 1); 1 where b is constant."""
    dims = tuple(range(1, a.ndim))
    std_a, std_b = (value.std(dims, correction=0, keepdim=True) for value in (a, b))
    return (std_a / std_b).where(std_b > 0, 1.0)
