"""Adaptive guidance: the reference is asked until it agrees with the conditional prediction."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffcore.core.prediction import Prediction, target
from diffcore.guidance.base import GuidanceInput, GuidanceWrapper, Step, per_row
from diffcore.guidance.reference import Reference


class Agreement(NamedTuple):
    """What AdaptiveGuidance remembers.

    Args:
        rows: (B,) those whose predictions agree.
        inside: memory of the rule inside.
    """

    rows: Tensor
    inside: Any


@dataclass(frozen=True)
class AdaptiveGuidance(GuidanceWrapper):
    """The rule inside until cos(F_c, F_ref) ≥ threshold; from the next evaluation on the conditional model.

    Castillo et al. 2023 (2312.12487). Each row stops by its own cosine, so a sample does not depend on the others; the
    reference is no longer asked once every row of the batch has stopped, so smaller batches save more. The smaller call
    changes last bits: ask in calls of a fixed size (`rows` of `sample`) where bits matter.

    The paper measures ε and stops at 0.991. There the cosine is above 0.992 at λ ≤ -3 whatever the images, as both are
    nearly x: it would stop at the first step. On v it rises with λ, and on a trained network may fall again where the noise is
    small; calibrate the threshold on your model with `AdaptiveGuidance.cosine` over `diffcore.sampling.loop.watch`.

    It decides from data: each evaluation asks the device for one boolean, until it has stopped.

    Args:
        inner: the rule inside, of one reference.
        threshold: of the cosine, within (-1, 1].
        space: the quantity F that is measured.
    """

    threshold: float = 0.991
    space: Literal["v_prediction", "sample"] = "v_prediction"

    refuses: ClassVar[dict[str, str]] = {
        "AdaptiveGuidance": "it would stop twice; use one, with the smaller threshold",
        "ClassifierGuidance": "it has no reference to stop asking; use Interval",
        "Composed": "it has several references, which do not agree at one time; use Interval",
        "Sum": "it has several references, which do not agree at one time; use Sum of AdaptiveGuidance",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.threshold <= 1:
            raise ValueError(
                f"threshold is {self.threshold}, expected a cosine within (-1, 1]; 0.991 is published"
            )
        if self.space not in get_args(Literal["v_prediction", "sample"]):
            raise ValueError(f"space is {self.space!r}, expected v_prediction or sample")

    def required_references(self, step: Step, memory: Agreement | None) -> tuple[Reference, ...]:
        wanted = self.inner.required_references(step, None if memory is None else memory.inside)
        if memory is None or not wanted:
            return wanted
        return () if bool(memory.rows.all()) else wanted

    def combine(
        self, seen: GuidanceInput, memory: Agreement | None
    ) -> tuple[Prediction, Agreement]:
        before = Agreement(self._none(seen.x), None) if memory is None else memory
        guided, inside = self.inner.combine(seen, before.inside)
        stopped = per_row(before.rows, seen.x)
        answer = Prediction(
            *(torch.where(stopped, c, g) for c, g in zip(seen.conditional, guided, strict=True))
        )
        rows = (
            before.rows | (self.cosine(seen) >= self.threshold) if seen.references else before.rows
        )
        return answer, Agreement(rows, inside)

    def cosine(self, seen: GuidanceInput) -> Tensor:
        """cos(F_c, F_ref) of each row, (B,); 0 where either is 0."""
        return self.cosine_in(self.space, seen)

    @staticmethod
    def cosine_in(
        space: Literal["epsilon", "v_prediction", "sample"], seen: GuidanceInput
    ) -> Tensor:
        """cos(F_c, F_ref) in any space."""
        pairs = (seen.conditional, seen.references[0])
        F_c, F_ref = (
            target(space, *p, seen.step.level, seen.step.process.sigma_data).flatten(1)
            for p in pairs
        )
        return cosine_similarity(F_c, F_ref, dim=1)

    @staticmethod
    def _none(x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
