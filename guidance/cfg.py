"""Classifier-free guidance, and autoguidance: the same rule away from a weaker network."""

from dataclasses import dataclass, field
from typing import Any

from diffcore.core.denoiser import Denoise
from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Contrast, GuidanceInput, extrapolated
from diffcore.guidance.reference import RUN, Reference, Unconditional, Weaker


@dataclass(frozen=True)
class CFG(Contrast):
    """D = D_ref + w (D_cond - D_ref), on x_0 and on ε alike (the rule is affine, so x = α x_0 + σ ε still holds).

    Ho & Salimans 2022 (2207.12598, eq. 6), whose w is ours less 1. w = 1 is the conditional model bit for bit, at one
    evaluation. Away from PerturbedAttention it is perturbed-attention guidance with s = w - 1.

    It does not sample p_ref^(1-w) p_cond^w: on p_cond = N(0, 1), p_ref = N(0, 2) the flow ends at variance 2^(1-w), the
    powered density has 2/(w+1).

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        reference: what to move away from.
    """

    def extrapolate(
        self, seen: GuidanceInput, reference: Prediction, scale: float, memory: Any
    ) -> tuple[Prediction, Any]:
        return extrapolated(reference, seen.conditional, scale), memory


@dataclass(frozen=True, repr=False)
class AutoGuidance(CFG):
    """D = D_weak + w (D_cond - D_weak): away from a weaker network under the same condition.

    Karras et al. 2024 (2406.02507): the weaker one is smaller and trained for less time on the same data; it needs neither
    condition dropout nor a condition. Published: w = 2.10 (ImageNet-512, S against XS at 1/16 of the training), 1.70
    (ImageNet-64). Any other rule does the same with reference=Weaker(...).

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        weaker: the weaker network's denoiser; on the command line the folder of its run.
    """

    reference: Reference = field(init=False, default=Unconditional())
    weaker: str | Denoise = field(default="", metadata=RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weaker == "":
            raise ValueError(
                "weaker is missing, expected a weaker network's denoiser, or the folder of its run"
            )
        object.__setattr__(self, "reference", Weaker(self.weaker))

    def __repr__(self) -> str:
        return f"AutoGuidance(scale={self.scale}, weaker={self.reference})"
