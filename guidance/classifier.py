"""Guidance by the gradient of a classifier, or by its logits alone (GFCG)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction, add_to_x0, expand_per_sample
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, Step
from diffcore.guidance.cfg import extrapolate_linearly
from diffcore.guidance.reference import (
    NETWORK_FIELD,
    Condition,
    LabelPerSample,
    Reference,
    WeakerNetwork,
)
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at
from diffcore.schedules import Level

__all__ = [
    "GFCG",
    "Classifier",
    "ClassifierGuidance",
    "GFCGMemory",
    "MinorityGuidance",
    "minority_classes",
    "minority_score",
]

Classifier = Callable[..., Any]
"""(x, level) -> logits (B, K), or log-probabilities (B,) of the desired class.

The result is `Any`: with `Tensor` the command line would look for a class of tensors.
"""

ClassifierInput = Literal["x", "x0"]


@dataclass(frozen=True)
class ClassifierGuidance(Guidance[None]):
    """Classifier guidance adds the gradient of a classifier's log-probability to the score.

        score ← score + w ∇_x ln p(y | x):   x_0 ← x_0 + w (σ²/α) ∇_x ln p,   ε ← ε - w σ ∇_x ln p
        ln p(y | x) = joint f_y - logsumexp_k(marginal f_k),   f the logits of the classifier

    Source: Dhariwal & Nichol 2021 (2105.05233, Algorithm 2); temperatures after "Elucidating the
    design space of classifier-guided diffusion generation" (2310.11311), which lowers `marginal`
    below `joint`. A classifier that returns (B,) gives the log-probability itself.

    input = "x": the classifier was trained on noisy data and receives x and the level; the gradient
    is exact. At pure noise (α = 0) the change is 0/0 and is left out: that evaluation gives the
    conditional model.

    input = "x0": a classifier of clean data receives the prediction of x_0, as in 2310.11311. The
    gradient does not pass through the network: ∂x_0/∂x is α s²/(α² s² + σ²), s the standard
    deviation of the data, which is exact for data N(·, s² I) and finite at each level.

    The gradient is not an evaluation of the network: a step costs one evaluation at each w.

    Args:
        classifier: function (x, level) -> logits (B, K); on the command line its import path, whose
            module is named by --trust.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ. Here 0 is no
            guidance and 1 is Bayes' rule.
        label: class y of all samples; None uses the condition of each sample.
        input: input of the classifier: x (noisy) or x0 (the predicted clean data).
        joint: temperature of the logit of y, above 0.
        marginal: temperature of the normalisation over classes, 0 or above.
    """

    classifier: Classifier
    scale: ScaleLike = 1.0
    label: int | None = None
    input: ClassifierInput = "x"
    joint: float = 1.0
    marginal: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        _check_classifier(self.classifier, "x")
        if self.input not in get_args(ClassifierInput):
            raise ValueError(
                f"input is {self.input!r}, expected x (a classifier of noisy data) or x0"
            )
        if not (0 < self.joint < math.inf and 0 <= self.marginal < math.inf):
            raise ValueError(
                f"joint and marginal are {self.joint} and {self.marginal}, expected finite "
                f"temperatures, joint above 0"
            )

    @property
    def reads_condition(self) -> bool:
        return self.label is None

    def required_references(self, step: Step, memory: None) -> tuple[Reference, ...]:
        return ()

    def check(self, process: Process, condition: Condition) -> None:
        if self.label is None and condition is None:
            raise ValueError(
                f"{type(self).__name__} needs a class to move towards: pass one label for each "
                "sample (--labels), or set label"
            )

    def combine(self, inputs: GuidanceInput, memory: None) -> tuple[Prediction, None]:
        x, level = inputs.x, inputs.step.level
        w = scale_at(self.scale, level)
        if w == 0 or level.sigma == 0:
            return inputs.conditional, memory
        y = inputs.condition
        if self.label is not None:
            y = torch.full((len(x),), self.label, device=x.device)
        point = x if self.input == "x" else inputs.conditional.x0
        gradient = self._gradient(point, level, y, inputs.step.process.classes)
        if self.input == "x0":
            change = w * _x0_gain(inputs.step) * gradient
        elif level.alpha == 0:  # 0/0, whose limit only an exact classifier would give
            return inputs.conditional, memory
        else:
            change = (w * level.sigma**2 / level.alpha) * gradient
        return add_to_x0(inputs.conditional, change, level), memory

    def _gradient(self, point: Tensor, level: Level, y: Tensor | None, classes: int) -> Tensor:
        """∇ ln p(y | point), (B, *shape)."""
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value = self._log_probability(self.classifier(point, level), y, classes).sum()
            if not value.requires_grad:
                raise ValueError(
                    "the classifier's log-probability is not differentiable in its input: build it "
                    "from torch functions without no_grad or detach, or use GFCG, which needs no "
                    "gradient"
                )
            (gradient,) = torch.autograd.grad(value, point, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "the classifier's log-probability does not depend on its input by torch "
                "functions, so it is not differentiable: remove detach or numpy from it, or use "
                "GFCG, which needs no gradient"
            )
        return gradient.to(point)

    def _log_probability(self, logits: Tensor, y: Tensor | None, classes: int) -> Tensor:
        """ln p(y | x) of each sample, (B,); 0 for samples with the null label."""
        if logits.ndim == 1:
            return logits
        assert y is not None  # `check` raises an error without labels
        expected = classes if self.label is None else self.label + 1
        if logits.ndim != 2 or logits.shape[1] < expected:
            raise ValueError(
                f"the classifier returns shape {tuple(logits.shape)}, expected (B,) or logits of "
                f"{expected} classes or more"
            )
        y = y.to(logits.device)
        if self.label is not None or not classes:
            return self._of_class(logits, y)
        # The null label is beyond the logits; samples that have it are not guided.
        return self._of_class(logits, y.clamp(max=classes - 1)).where(y < classes, 0.0)

    def _of_class(self, logits: Tensor, y: Tensor) -> Tensor:
        """joint f_y - logsumexp_k(marginal f_k) of each sample, (B,)."""
        f_y = logits.gather(1, y[:, None])[:, 0]
        return self.joint * f_y - (self.marginal * logits).logsumexp(1)


@dataclass(frozen=True)
class MinorityGuidance(ClassifierGuidance):
    """Minority guidance is classifier guidance towards rare samples.

        l(x_0) = E ‖x_0 - x̂_0(α x_0 + σ ε)‖²,   cut by its quantiles into K classes
        score ← score + w ∇_x ln p(k | x)

    Rare samples are those that a denoiser reconstructs badly. Source: Um, Lee & Ye 2023
    (2301.12334, eq. 5 to 8). The classifier is trained on noisy samples and the minority class of
    each, computed by `minority_score` and `minority_classes`. The paper measures the error by
    LPIPS; here it is the squared error, which needs no other network.

    Args:
        classifier: function (x, level) -> logits (B, K) of the minority classes; on the command
            line its import path, whose module is named by --trust.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ. Here 0 is no
            guidance and 1 is Bayes' rule.
        label: minority class to move towards, required; K - 1 is the rarest.
        input: input of the classifier: x (noisy) or x0 (the predicted clean data).
        joint: temperature of the logit of the class, above 0.
        marginal: temperature of the normalisation over classes, 0 or above.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is None or self.label < 0:
            raise ValueError(
                f"label is {self.label}, expected a minority class, K - 1 for the rarest"
            )


def minority_score(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    eps: Tensor,
    level: Level,
    condition: BatchCondition | None = None,
) -> Tensor:
    """‖x_0 - x̂_0(α x_0 + σ ε)‖² / n, the error with which a denoiser reconstructs each sample.

    Args:
        denoiser: denoiser that reconstructs x_0.
        x0: (B, *shape) clean samples.
        eps: (B, *shape) noise; average the score over several draws.
        level: level to which the samples are noised.
        condition: (B,) labels, or None without a condition.

    Returns:
        (B,) scores, means over the n elements of a sample; the higher, the rarer.
    """
    predicted = denoiser(level.alpha * x0 + level.sigma * eps, level, condition).x0
    return mse_loss(predicted, x0, reduction="none").flatten(1).mean(1)


def minority_classes(scores: Tensor, count: int) -> Tensor:
    """Cut scores by their quantiles into equally large classes, on which the classifier is trained.

    Args:
        scores: (B,) minority scores.
        count: number K of classes.

    Returns:
        (B,) class of each score, from 0 (common) to K - 1 (rare).
    """
    inner = torch.arange(1, count, dtype=scores.dtype, device=scores.device) / count
    return torch.bucketize(scores, scores.quantile(inner), right=True)


class GFCGMemory(NamedTuple):
    """State of GFCG: what the classifier returned at the last evaluation.

    Args:
        rivals: (B,) the most likely class other than the desired one.
        doubt: (B,) 1 - p(y | x_0).
    """

    rivals: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class GFCG(Guidance[GFCGMemory]):
    """Gradient-free classifier guidance: a classifier chooses the reference class and the scale.

        D = D_r + w' (D_y - D_r)
        r = argmax_{k ≠ y} p(k | x_0),   w' = 1 + (w - 1)(1 - p(y | x_0))

    Source: Shenoy et al. 2024 (2411.15393). A classifier of clean data is applied, forward only,
    to the prediction of x_0. The class that it confuses most with y becomes the reference, and
    the scale adapts to the confusion. The formula of w' is a choice of this library, not the
    paper's: it guides in full where the classifier is sure of another class, and not at all where
    it is sure of y.

    The classifier's result at the previous evaluation decides, so that both classes share one
    forward. The first step is the conditional model; later steps cost two evaluations. No
    condition dropout is needed. Where the rule starts later (within an Interval, at a corrector),
    its first evaluation is the conditional model too, and its reference is evaluated without
    effect.

    Args:
        classifier: function (x_0, level) -> logits (B, K) of the network's classes; on the command
            line its import path, whose module is named by --trust.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        weaker: denoiser of a weaker network for the reference, or the folder of its run; "" uses
            the same network.
    """

    classifier: Classifier
    scale: ScaleLike = 2.0
    weaker: str | DenoiserProtocol = field(default="", metadata=NETWORK_FIELD, repr=False)

    def __post_init__(self) -> None:
        check_scale(self.scale)
        _check_classifier(self.classifier, "x_0")

    @property
    def depends_on_steps(self) -> bool:
        return True

    def required_references(self, step: Step, memory: GFCGMemory | None) -> tuple[Reference, ...]:
        if step.index == 0 or scale_at(self.scale, step.level) == 1:
            return ()
        rivals = None if memory is None else memory.rivals
        return (LabelPerSample(rivals, WeakerNetwork(self.weaker) if self.weaker else None),)

    def check(self, process: Process, condition: Condition) -> None:
        if condition is None:
            raise ValueError(
                "GFCG needs a class to move towards: pass one label for each sample (--labels)"
            )

    def combine(
        self, inputs: GuidanceInput, memory: GFCGMemory | None
    ) -> tuple[Prediction, GFCGMemory]:
        prediction = inputs.conditional
        if inputs.references and memory is not None:
            scale = 1 + (scale_at(self.scale, inputs.step.level) - 1) * memory.doubt
            scale = expand_per_sample(scale.to(inputs.x), inputs.x)
            prediction = extrapolate_linearly(inputs.references[0], prediction, scale)
        return prediction, self._classify(inputs)

    def _classify(self, inputs: GuidanceInput) -> GFCGMemory:
        """The rival class and the doubt of each sample, from the conditional prediction of x_0."""
        logits = self.classifier(inputs.conditional.x0, inputs.step.level)
        classes = inputs.step.process.classes
        if logits.shape != (len(inputs.x), classes):
            raise ValueError(
                f"the classifier returns shape {tuple(logits.shape)}, expected "
                f"({len(inputs.x)}, {classes}): logits of the network's classes"
            )
        assert inputs.condition is not None  # `check` raises an error without labels
        p = logits.detach().softmax(1)
        # Samples with the null label have no desired class; any class serves.
        y = inputs.condition.to(p.device).clamp(max=classes - 1)[:, None]
        others = p.scatter(1, y, -torch.ones_like(p))
        return GFCGMemory(others.argmax(1), 1 - p.gather(1, y)[:, 0])


def _check_classifier(classifier: Classifier, argument: str) -> None:
    """Raise ValueError unless the classifier can be called."""
    if not callable(classifier):
        raise ValueError(
            f"classifier is {classifier!r}, expected a function ({argument}, level) -> logits"
        )


def _x0_gain(step: Step) -> float:
    """(σ²/α) ∂x_0/∂x = σ² s² / (α² s² + σ²) for data of standard deviation s."""
    alpha, sigma, s = float(step.level.alpha), float(step.level.sigma), step.process.sigma_data
    return sigma**2 * s**2 / (alpha**2 * s**2 + sigma**2)
