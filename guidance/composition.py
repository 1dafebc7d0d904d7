"""Several conditions at once, and several rules at once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, Step, check_rule, extrapolated
from diffcore.guidance.cfg_zero_star import CFGZeroStar
from diffcore.guidance.reference import Condition, Label, Reference, Unconditional, check_reference
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at


@dataclass(frozen=True)
class Composed(Guidance):
    """D = D_ref + w (D_cond - D_ref) + Σ_i w_i (D_i - D_ref): each sample's own condition, and further labels.

    Liu et al. 2022 (2206.01714, eq. 11 and 13): a weight above 0 asks for both (conjunction), below 0 for one and not the
    other (negation). At one level it is the score of p(x) Π_i (p(x | i)/p(x))^(w_i); a sampled path is not that density, as
    for CFG. It costs 2 + the number of labels.

    Args:
        labels: further classes, the same for every sample.
        weights: their w_i, negative to negate.
        scale: w ≥ 0 of each sample's own condition: a number, a scale schedule, or in Python any function of λ.
        reference: what all of them move away from.
    """

    labels: tuple[int, ...]
    weights: tuple[float, ...]
    scale: ScaleLike = 1.0
    reference: Reference = Unconditional()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.labels or len(self.labels) != len(self.weights):
            raise ValueError(
                f"labels are {self.labels} and weights {self.weights}, expected one weight for each label"
            )
        if not all(math.isfinite(w) for w in self.weights):
            raise ValueError(
                f"weights are {self.weights}, expected finite numbers, below 0 to negate"
            )
        check_scale(self.scale)
        check_reference(self.reference)

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return (self.reference, *map(Label, self.labels))

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        if not seen.references:  # a rule around this one switched it off
            return seen.conditional, memory
        reference, *others = seen.references
        x0, eps = extrapolated(reference, seen.conditional, scale_at(self.scale, seen.step.level))
        for w, other in zip(self.weights, others, strict=True):
            x0, eps = x0 + w * (other.x0 - reference.x0), eps + w * (other.eps - reference.eps)
        return Prediction(x0, eps), memory


@dataclass(frozen=True)
class Sum(Guidance):
    """D = D_cond + Σ_i (D_i - D_cond): the changes that several rules make to the conditional prediction, added.

    CFG and perturbed attention at once (2403.17377, eq. 17): Sum((CFG(4.0), CFG(3.0, PerturbedAttention()))). Each keeps
    its own memory, and decides for itself when it needs its references; equal references are asked once.

    Args:
        rules: two or more rules.
    """

    rules: tuple[Guidance, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if len(self.rules) < 2:
            raise ValueError(f"rules are {self.rules}, expected two or more")
        for rule in self.rules:
            check_rule(rule)
        for part in (part for rule in self.rules for part in rule.parts()):
            if not part.consistent:
                raise ValueError(
                    "Sum cannot hold CFGPlusPlus: its x_0 and ε do not belong together; use CFG"
                )
            if isinstance(part, CFGZeroStar) and part.zero_init:
                raise ValueError(
                    "Sum cannot hold CFGZeroStar that stands still at first: use zero_init=0"
                )

    @property
    def reads_condition(self) -> bool:  # type: ignore[override]
        return any(rule.reads_condition for rule in self.rules)

    @property
    def once_a_step(self) -> bool:  # type: ignore[override]
        return any(rule.once_a_step for rule in self.rules)

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        asked = (reference for wanted in self._wanted(step, memory) for reference in wanted)
        return tuple(dict.fromkeys(asked))

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        wanted = self._wanted(seen.step, memory)
        asked = tuple(dict.fromkeys(reference for references in wanted for reference in references))
        known = dict(zip(asked, seen.references, strict=bool(seen.references)))
        x0, eps = seen.conditional
        after = []
        for rule, references, before in zip(
            self.rules, wanted, self._memories(memory), strict=True
        ):
            own = tuple(known[reference] for reference in references if reference in known)
            guided, remembered = rule.combine(seen._replace(references=own), before)
            x0, eps = (
                x0 + (guided.x0 - seen.conditional.x0),
                eps + (guided.eps - seen.conditional.eps),
            )
            after.append(remembered)
        return Prediction(x0, eps), tuple(after)

    def levels(self, process: Process) -> tuple[float, ...]:
        return tuple(level for rule in self.rules for level in rule.levels(process))

    def check(self, process: Process, condition: Condition) -> None:
        for rule in self.rules:
            rule.check(process, condition)

    def parts(self) -> Iterator[Guidance]:
        yield self
        for rule in self.rules:
            yield from rule.parts()

    def _memories(self, memory: Any) -> tuple[Any, ...]:
        return (None,) * len(self.rules) if memory is None else memory

    def _wanted(self, step: Step, memory: Any) -> list[tuple[Reference, ...]]:
        return [
            rule.required_references(step, own)
            for rule, own in zip(self.rules, self._memories(memory), strict=True)
        ]
