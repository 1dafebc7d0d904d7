"""Guidance rescale: the guided output gets back the standard deviation of the conditional one."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from diffcore.core.prediction import Prediction, PredictionType, predict, target
from diffcore.guidance.base import Guidance, GuidanceInput, GuidanceWrapper, Step, check_space
from diffcore.guidance.cfg_zero_star import CFGZeroStar
from diffcore.guidance.reference import Reference


@dataclass(frozen=True)
class Rescale(GuidanceWrapper):
    """F = φ F_g std(F_c)/std(F_g) + (1 - φ) F_g, std over a row: the guided output F_g shrunk to the conditional's size.

    Lin et al. 2023 (2305.08891, section 3.4; φ = 0.7 recommended). F is the network's own output, as published, so the
    result depends on what the network predicts unless `space` says otherwise. A row with std(F_g) = 0 is left as it is,
    and so is what the rule inside did not change.

    Args:
        inner: the rule whose answer is rescaled.
        phi: φ within [0, 1].
        space: the quantity F; None is what the network outputs.
    """

    phi: float = 0.7
    space: PredictionType | None = None

    refuses: ClassVar[dict[str, str]] = {
        "Rescale": "its answer is rescaled already; use one Rescale with a larger phi",
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
        if any(_stops(part) for part in self.inner.parts()):
            raise ValueError(
                "Rescale cannot hold CFGZeroStar with zero_init above 0: its first steps have no velocity to rescale; "
                "use zero_init=0"
            )

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        wanted = super().required_references(step, memory)
        if wanted:
            check_space(self, self.space or step.process.prediction, step.level)
        return wanted

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        guided, memory = self.inner.combine(seen, memory)
        if guided is seen.conditional:
            return guided, memory
        process, level = seen.step.process, seen.step.level
        kind = self.space or process.prediction
        check_space(self, kind, level)  # here too: a classifier asks for no reference
        F, F_c = (
            target(kind, *prediction, level, process.sigma_data)
            for prediction in (guided, seen.conditional)
        )
        rescaled = F * (self.phi * _ratio(F_c, F) + 1 - self.phi)
        return predict(kind, rescaled, seen.x, level, process.sigma_data), memory


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """std(a)/std(b) of each row, 1 where b is constant."""
    dims = tuple(range(1, a.ndim))
    top, bottom = (value.std(dims, correction=0, keepdim=True) for value in (a, b))
    return (top / bottom).where(bottom > 0, 1.0)


def _stops(part: Guidance) -> bool:
    return isinstance(part, CFGZeroStar) and part.zero_init > 0
