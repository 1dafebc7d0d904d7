"""Denoisers whose pair is the guided one, with one scale or with a scale of each sample."""

from torch import Tensor

from diffcore.core.condition_values import GUIDANCE_SCALE, without_value
from diffcore.core.conditions import BatchCondition, Conditions
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.prediction import Prediction, expand_per_sample
from diffcore.guidance import Guidance, evaluate_queries
from diffcore.guidance.cfg import extrapolate_linearly
from diffcore.guidance.reference import Query, Unconditional
from diffcore.sampling.loop import guided_prediction
from diffcore.schedules import Level

__all__ = ["GuidedDenoiser", "ScaledDenoiser", "predict_guided"]


class GuidedDenoiser(DenoiserWrapper):
    """A denoiser whose pair (x_0, ε) is the guided one.

    Args:
        inner: denoiser that is guided.
        guidance: rule without state, such as CFG(2.0).
    """

    def __init__(self, inner: DenoiserProtocol, guidance: Guidance) -> None:
        super().__init__(inner)
        self.guidance = guidance

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        return guided_prediction(self.inner, self.guidance, x, level, condition, None)[0]


def predict_guided(
    denoiser: DenoiserProtocol,
    x: Tensor,
    level: Level,
    condition: BatchCondition | None,
    scale: Tensor,
) -> Prediction:
    """The prediction of classifier-free guidance with a scale of its own for each sample.

        guided = ref + w (cond - ref),   ref without the condition; one forward of 2B rows

    Args:
        denoiser: denoiser without guidance, of a network that was trained with condition dropout.
        x: noisy samples (B, *shape).
        level: noise level of all samples, or levels that broadcast against x.
        condition: class labels (B,), or `Conditions`.
        scale: w of shape (B,); 1 is the conditional prediction.

    Returns:
        The guided prediction, of the shape and dtype of x.
    """
    queries = [Query(denoiser, condition), Unconditional().query(denoiser, condition, x)]
    conditional, reference = evaluate_queries(queries, x, level)
    return extrapolate_linearly(reference, conditional, expand_per_sample(scale.to(x), x))


class ScaledDenoiser(DenoiserWrapper):
    """A denoiser with classifier-free guidance whose scale is a condition of each sample.

    Its conditions are those of the inner denoiser, and w (B, 1) as `guidance_scale`.

    Args:
        inner: denoiser without guidance, of a network that was trained with condition dropout.
    """

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        if not isinstance(condition, Conditions) or GUIDANCE_SCALE not in condition.values:
            raise ValueError(
                f"the condition {GUIDANCE_SCALE} is missing: pass Conditions with w of each sample"
            )
        scale = condition.values[GUIDANCE_SCALE][:, 0]
        rest = without_value(condition, GUIDANCE_SCALE)
        return predict_guided(self.inner, x, level, rest, scale)
