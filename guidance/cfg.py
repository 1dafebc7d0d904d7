"""Classifier-free guidance and autoguidance: guided = ref + w (cond - ref)."""

from dataclasses import dataclass, field

from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Contrast, GuidanceInput, Step
from diffcore.guidance.reference import NETWORK_FIELD, Reference, Unconditional, WeakerNetwork

__all__ = ["CFG", "AutoGuidance", "extrapolate_linearly"]


def extrapolate_linearly(
    reference: Prediction, conditional: Prediction, scale: float | Tensor
) -> Prediction:
    """guided = ref + w (cond - ref), on x_0 and on ε alike.

    The rule is affine: if x = α x_0 + σ ε holds for both predictions, it holds for the guided one.

    Args:
        reference: ref, the prediction to extrapolate away from.
        conditional: cond, the prediction under the condition.
        scale: w, a number or a tensor that broadcasts to x_0; 0 gives ref, 1 gives cond.

    Returns:
        The guided prediction.
    """
    return Prediction(
        x0=reference.x0 + scale * (conditional.x0 - reference.x0),
        eps=reference.eps + scale * (conditional.eps - reference.eps),
    )


@dataclass(frozen=True)
class CFG(Contrast[None]):
    """Classifier-free guidance extrapolates linearly from the reference beyond the conditional.

        guided = ref + w (cond - ref),   on x_0 and on ε alike

    The rule is affine, so x = α x_0 + σ ε still holds. Source: Ho & Salimans 2022 (2207.12598,
    eq. 6), whose w is ours less 1. At w = 1 it is the conditional model bit for bit, at one
    evaluation. With the reference PerturbedAttention it is perturbed-attention guidance, s = w - 1.

    It does not sample p_ref^(1-w) p_cond^w: on p_cond = N(0, 1), p_ref = N(0, 2) the flow ends at
    variance 2^(1-w), while the powered density has 2/(w+1).

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        reference: prediction to extrapolate away from; by default the unconditional one.
    """

    def traceable(self, step: Step) -> "CFG":
        return self.with_scale_at(step)

    def extrapolate(
        self, inputs: GuidanceInput, reference: Prediction, scale: float, memory: None
    ) -> tuple[Prediction, None]:
        return extrapolate_linearly(reference, inputs.conditional, scale), memory


@dataclass(frozen=True, repr=False)
class AutoGuidance(CFG):
    """Autoguidance extrapolates away from a weaker network under the same condition.

        guided = weak + w (cond - weak),   on x_0 and on ε alike

    Source: Karras et al. 2024 (2406.02507). The weaker network is smaller and trained for less time
    on the same data; it needs neither condition dropout nor a condition. Published: w = 2.10
    (ImageNet-512, S against XS at 1/16 of the training), w = 1.70 (ImageNet-64). Any other rule
    does the same with reference=WeakerNetwork(...).

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        weaker: denoiser of the weaker network; on the command line the folder of its run.
    """

    reference: Reference = field(init=False, default=Unconditional())
    weaker: str | DenoiserProtocol = field(default="", metadata=NETWORK_FIELD)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weaker == "":
            raise ValueError(
                "weaker is missing, expected a weaker network's denoiser, or the folder of its run"
            )
        object.__setattr__(self, "reference", WeakerNetwork(self.weaker))

    def __repr__(self) -> str:
        return f"AutoGuidance(scale={self.scale}, weaker={self.reference})"
