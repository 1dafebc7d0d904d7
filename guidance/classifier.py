"""Classifier guidance: the gradient of a log-probability moves the prediction."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcore.core.denoiser import Denoise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, Step, moved
from diffcore.guidance.reference import Condition, Reference
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at
from diffcore.schedules import Level

Classifier = Callable[..., Any]
"""(x, level) -> logits (B, K), or (B,) log-probabilities of what is wanted. (Told to return a Tensor, the command line
would take a class of tensors for it.)"""


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """score ← score + w ∇_x ln p(y | x): x_0 ← x_0 + w (σ²/α) ∇_x ln p and ε ← ε - w σ ∇_x ln p, from the prediction asked.

        ln p(y | x) = joint f_y - logsumexp_k(marginal f_k)

    of the classifier's logits f. Dhariwal & Nichol 2021 (2105.05233, Algorithm 2); temperatures after "Elucidating the
    design space of classifier-guided diffusion generation" (2310.11311), which lowers `marginal` below `joint` (to 0.5 or
    so; values from memory). A classifier that answers (B,) gives the log-probability itself.

    input = "x": the classifier knows noise, and is asked about x at the level; the gradient is exact. At pure noise (α = 0)
    the change is 0/0 and left out: that step is the conditional model's.
    input = "x0": an off-the-shelf classifier is asked about the prediction of x_0, as in 2310.11311. Nothing is
    differentiated through the network: ∂x_0/∂x is taken as α s²/(α² s² + σ²), s the data's standard deviation, which is
    exact for data N(·, s² I) and finite at every level.

    A gradient is no evaluation of the network: w = 0 costs none, and so does every w.

    Args:
        classifier: (x, level) -> logits (B, K); on the command line its import path, with --trust.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ. Here 0 is no guidance and 1 Bayes' rule.
        label: the class y of every sample; None takes each sample's condition.
        input: x, or x0.
        joint: temperature of the logit of y.
        marginal: temperature of the normalisation over classes.
    """

    classifier: Classifier
    scale: ScaleLike = 1.0
    label: int | None = None
    input: Literal["x", "x0"] = "x"
    joint: float = 1.0
    marginal: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not callable(self.classifier):
            raise ValueError(
                f"classifier is {self.classifier!r}, expected a function (x, level) -> logits"
            )
        if self.input not in get_args(Literal["x", "x0"]):
            raise ValueError(
                f"input is {self.input!r}, expected x (a classifier that knows noise) or x0"
            )
        if not (0 < self.joint < math.inf and 0 <= self.marginal < math.inf):
            raise ValueError(
                f"joint and marginal are {self.joint} and {self.marginal}, expected finite temperatures, joint above 0"
            )

    @property
    def reads_condition(self) -> bool:  # type: ignore[override]
        return self.label is None

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return ()

    def check(self, process: Process, condition: Condition) -> None:
        if self.label is None and condition is None:
            raise ValueError(
                f"{type(self).__name__} needs a class to move towards: pass one label a sample (--labels), or set label"
            )

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        level = seen.step.level
        w = scale_at(self.scale, level)
        if w == 0 or level.sigma == 0:
            return seen.conditional, memory
        y = (
            seen.condition
            if self.label is None
            else torch.full((len(seen.x),), self.label, device=seen.x.device)
        )
        at = seen.x if self.input == "x" else seen.conditional.x0
        gradient = self._gradient(at, level, y, seen.step.process.classes)
        if self.input == "x0":
            return moved(seen.conditional, w * _gain(seen.step) * gradient, level), memory
        if (
            level.alpha == 0
        ):  # the gradient vanishes as α does: 0/0, whose limit only an exact classifier would show
            return seen.conditional, memory
        return moved(seen.conditional, (w * level.sigma**2 / level.alpha) * gradient, level), memory

    def _gradient(self, at: Tensor, level: Level, y: Tensor | None, classes: int) -> Tensor:
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            value = self._log_probability(self.classifier(at, level), y, classes).sum()
            if not value.requires_grad:
                raise ValueError(
                    "the classifier's log-probability is not differentiable in its input: build it from torch functions "
                    "without no_grad or detach, or use GFCG, which needs no gradient"
                )
            (gradient,) = torch.autograd.grad(value, at, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "the classifier's log-probability does not depend on its input by torch functions, so it is not "
                "differentiable: remove detach or numpy from it, or use GFCG, which needs no gradient"
            )
        return gradient.to(at)

    def _log_probability(self, logits: Tensor, y: Tensor | None, classes: int) -> Tensor:
        if logits.ndim == 1:
            return logits
        assert y is not None  # `check` refuses it
        known = classes if self.label is None else self.label + 1
        if logits.ndim != 2 or logits.shape[1] < known:
            raise ValueError(
                f"the classifier answers {tuple(logits.shape)}, expected (B,) or logits of {known} classes or more"
            )
        y = y.to(logits.device)
        if self.label is not None or not classes:
            return self._of_class(logits, y)
        return self._of_class(logits, y.clamp(max=classes - 1)).where(
            y < classes, 0.0
        )  # the null label wants nothing

    def _of_class(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.joint * logits.gather(1, y[:, None])[:, 0] - (self.marginal * logits).logsumexp(
            1
        )


@dataclass(frozen=True)
class MinorityGuidance(ClassifierGuidance):
    """Classifier guidance towards a level of the minority score: samples that a denoiser reconstructs badly are rare ones.

        l(x_0) = E ‖x_0 - x̂_0(α x_0 + σ ε)‖²,   its quantiles cut it into K levels,   ∇_x ln p(level | x)

    Um, Lee & Ye 2023 (2301.12334, eq. 5 to 8): the classifier is trained on noisy samples and the level of each, which
    `minority_score` and `minority_levels` make. The paper measures with LPIPS; here it is the squared error, which needs
    no other network. K - 1 is the rarest level.

    Args:
        classifier: (x, level) -> logits (B, K) of the levels; on the command line its import path, with --trust.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        label: the level to move towards, K - 1 for the rarest.
        input: x, or x0.
        joint: temperature of the logit of the level.
        marginal: temperature of the normalisation over levels.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is None or self.label < 0:
            raise ValueError(
                f"label is {self.label}, expected a level of the minority score, K - 1 for the rarest"
            )


def minority_score(
    denoiser: Denoise, x0: Tensor, eps: Tensor, level: Level, condition: Tensor | None = None
) -> Tensor:
    """‖x_0 - x̂_0(α x_0 + σ ε)‖² / D of each row, (B,): average it over several ε."""
    predicted = denoiser(level.alpha * x0 + level.sigma * eps, level, condition).x0
    return mse_loss(predicted, x0, reduction="none").flatten(1).mean(1)


def minority_levels(scores: Tensor, count: int) -> Tensor:
    """The level 0 .. count - 1 of each score, as many scores in each: what the classifier is trained to tell."""
    inner = torch.arange(1, count, dtype=scores.dtype, device=scores.device) / count
    return torch.bucketize(scores, scores.quantile(inner), right=True)


def _gain(step: Step) -> float:
    """(σ²/α) ∂x_0/∂x for data of standard deviation s: σ² s² / (α² s² + σ²)."""
    alpha, sigma, s = float(step.level.alpha), float(step.level.sigma), step.process.sigma_data
    return sigma**2 * s**2 / (alpha**2 * s**2 + sigma**2)
