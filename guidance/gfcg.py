"""Gradient-free classifier guidance: a classifier's confusion chooses the reference and the scale."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, Step, extrapolated, per_row
from diffcore.guidance.classifier import Classifier
from diffcore.guidance.reference import RUN, Condition, Labels, Reference, Weaker
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at


class Confusion(NamedTuple):
    """What GFCG remembers of the last evaluation.

    Args:
        labels: (B,) the most likely class that is not wanted.
        doubt: (B,) 1 - p(y | x_0).
    """

    labels: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class GFCG(Guidance):
    """D = D_r + w' (D_y - D_r),   r = argmax_{k ≠ y} p(k | x_0),   w' = 1 + (w - 1)(1 - p(y | x_0)).

    Shenoy et al. 2024 (2411.15393): an off-the-shelf classifier is run forward on the prediction of x_0, the class that it
    confuses most with the wanted one becomes the reference, and the scale adapts to the confusion. The paper's formula of
    the scale was not found: this one is our choice. It guides in full where the classifier is sure of another class, and
    not where it is sure of y. The classifier's last evaluation decides, so that both classes go into one forward: the
    first step is the conditional model. Two evaluations a step afterwards; no condition dropout is needed. Where the rule comes
    in later (within an Interval, at a corrector), its first evaluation is the conditional model too, and asks for a reference
    in vain.

    Args:
        classifier: (x_0, level) -> logits (B, K) of the network's classes; on the command line its import path.
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        weaker: another network, or the folder of its run, to ask about the confused class; "" is the same network.
    """

    classifier: Classifier
    scale: ScaleLike = 2.0
    weaker: str | Denoise = field(default="", metadata=RUN, repr=False)

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not callable(self.classifier):
            raise ValueError(
                f"classifier is {self.classifier!r}, expected a function (x_0, level) -> logits"
            )

    def required_references(self, step: Step, memory: Confusion | None) -> tuple[Reference, ...]:
        if step.index == 0 or scale_at(self.scale, step.level) == 1:
            return ()
        return (
            Labels(
                None if memory is None else memory.labels,
                Weaker(self.weaker) if self.weaker else None,
            ),
        )

    def check(self, process: Process, condition: Condition) -> None:
        if condition is None:
            raise ValueError(
                "GFCG needs a class to move towards: pass one label a sample (--labels)"
            )

    def combine(
        self, seen: GuidanceInput, memory: Confusion | None
    ) -> tuple[Prediction, Confusion]:
        answer = seen.conditional
        if seen.references and memory is not None:
            scale = 1 + (scale_at(self.scale, seen.step.level) - 1) * memory.doubt
            answer = extrapolated(seen.references[0], answer, per_row(scale.to(seen.x), seen.x))
        return answer, self._confusion(seen)

    def _confusion(self, seen: GuidanceInput) -> Confusion:
        logits = self.classifier(seen.conditional.x0, seen.step.level)
        classes = seen.step.process.classes
        if logits.shape != (len(seen.x), classes):
            raise ValueError(
                f"the classifier answers {tuple(logits.shape)}, expected ({len(seen.x)}, {classes}): logits of the "
                f"network's classes"
            )
        assert seen.condition is not None  # `check` refuses it
        p = logits.detach().softmax(1)
        y = seen.condition.to(p.device).clamp(max=classes - 1)[
            :, None
        ]  # rows without a condition: any class will do
        others = p.scatter(1, y, -torch.ones_like(p))
        return Confusion(others.argmax(1), 1 - p.gather(1, y)[:, 0])
