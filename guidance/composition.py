"""Several conditions in one rule, and the sum of several rules."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, Step, check_inner_rule
from diffcore.guidance.cfg import extrapolate_linearly
from diffcore.guidance.reference import (
    Condition,
    Label,
    Reference,
    Unconditional,
    Without,
    check_names,
    check_reference,
)
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at

__all__ = ["ComposedConditions", "ScaledConditions", "Sum"]


@dataclass(frozen=True)
class ComposedConditions(Guidance[None]):
    """Composed conditions: each sample's own condition and further labels, added or subtracted.

        D = D_ref + w (D_cond - D_ref) + Σ_i w_i (D_i - D_ref),   on x_0 and on ε alike

    Source: Liu et al. 2022 (2206.01714, eq. 11 and 13). A weight above 0 requires both conditions
    (conjunction), a weight below 0 one without the other (negation). At one level it is the score
    of p(x) Π_i (p(x | i)/p(x))^(w_i); a sampled path does not follow that density, as for CFG. An
    evaluation costs 2 + the number of labels calls of the network.

    Args:
        labels: further classes, the same for all samples.
        weights: w_i of each further class; negative to negate it.
        scale: w ≥ 0 of each sample's own condition: a number, a scale schedule, or in Python any
            function of λ.
        reference: prediction that all conditions extrapolate away from; by default the
            unconditional one.
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
                f"labels are {self.labels} and weights {self.weights}, expected one weight for "
                "each label"
            )
        if not all(math.isfinite(w) for w in self.weights):
            raise ValueError(
                f"weights are {self.weights}, expected finite numbers, below 0 to negate"
            )
        check_scale(self.scale)
        check_reference(self.reference)

    def required_references(self, step: Step, memory: None) -> tuple[Reference, ...]:
        return (self.reference, *map(Label, self.labels))

    def combine(self, inputs: GuidanceInput, memory: None) -> tuple[Prediction, None]:
        if not inputs.references:  # a wrapper has omitted the references
            return inputs.conditional, memory
        reference, *others = inputs.references
        w = scale_at(self.scale, inputs.step.level)
        guided = extrapolate_linearly(reference, inputs.conditional, w)
        for w_i, other in zip(self.weights, others, strict=True):
            guided = _add_difference(guided, w_i, other, reference)
        return guided, memory


@dataclass(frozen=True)
class ScaledConditions(Guidance[None]):
    """Each condition has a scale of its own, in an order of the conditions c_1, ..., c_n.

        D = D(∅) + Σ_k w_k (D(c_1, ..., c_k) - D(c_1, ..., c_(k-1))),   on x_0 and on ε alike
          = D_n + (1 - w_1)(D_0 - D_n) + Σ_(0<k<n) (w_k - w_(k+1))(D_k - D_n)

    D_k is the prediction under c_1, ..., c_k, and conditions that are not named are kept. Source:
    InstructPix2Pix, Brooks et al. 2023 (2211.09800, eq. 3), where c_1 is the image and c_2 the
    text. A prediction whose factor is 0 is not evaluated: with equal scales the rule is CFG away
    from `Without(names)`, and with scales of 1 it is the conditional model, at one evaluation.
    Every named condition needs a dropout above 0, independent of that of the others.

    Args:
        names: conditions in order; `label` is the class label or the prompt.
        scales: w_k ≥ 0 of each condition: numbers, scale schedules, or in Python any functions of
            λ.
    """

    names: tuple[str, ...]
    scales: tuple[ScaleLike, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.names or len(self.names) != len(self.scales):
            raise ValueError(
                f"names are {self.names} and scales {self.scales}, expected one scale for each "
                "condition"
            )
        Without(self.names)  # refuses a name that is repeated
        for scale in self.scales:
            check_scale(scale)

    def required_references(self, step: Step, memory: None) -> tuple[Reference, ...]:
        return tuple(reference for reference, _ in self._terms(step))

    def combine(self, inputs: GuidanceInput, memory: None) -> tuple[Prediction, None]:
        if not inputs.references:
            return inputs.conditional, memory
        guided = conditional = inputs.conditional
        for (_, factor), other in zip(self._terms(inputs.step), inputs.references, strict=True):
            guided = _add_difference(guided, factor, other, conditional)
        return guided, memory

    def check(self, process: Process, condition: Condition) -> None:
        check_names(process, self.names, str(self))

    def _terms(self, step: Step) -> list[tuple[Reference, float]]:
        """The references D_k, k < n, and their factors other than 0."""
        scales = [1.0, *(scale_at(scale, step.level) for scale in self.scales)]
        factors = [before - after for before, after in pairwise(scales)]
        return [
            (Without(self.names[k:]), factor) for k, factor in enumerate(factors) if factor != 0
        ]


@dataclass(frozen=True)
class Sum(Guidance[tuple[Any, ...]]):
    """The sum of rules adds the changes that each makes to the conditional prediction.

        D = D_cond + Σ_i (D_i - D_cond),   on x_0 and on ε alike

    CFG with perturbed attention (2403.17377, eq. 17) is
    Sum((CFG(4.0), CFG(3.0, PerturbedAttention()))). Each rule has its own memory and decides itself
    when it needs its references. Equal references are evaluated once.

    Args:
        rules: two or more rules.
    """

    rules: tuple[Guidance, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if len(self.rules) < 2:
            raise ValueError(f"rules are {self.rules}, expected two or more")
        for rule in self.rules:
            check_inner_rule(rule)
            if not rule.is_consistent:
                raise ValueError(
                    "Sum cannot hold CFGPlusPlus: its x_0 and ε do not belong together; use CFG"
                )
            if rule.has_zero_init:
                raise ValueError(
                    "Sum cannot hold CFGZeroStar with zero_init above 0: its first steps have no "
                    "velocity to add; use zero_init=0"
                )

    @property
    def reads_condition(self) -> bool:
        return any(rule.reads_condition for rule in self.rules)

    @property
    def requires_one_evaluation_per_step(self) -> bool:
        return any(rule.requires_one_evaluation_per_step for rule in self.rules)

    @property
    def depends_on_steps(self) -> bool:
        return any(rule.depends_on_steps for rule in self.rules)

    def required_references(
        self, step: Step, memory: tuple[Any, ...] | None
    ) -> tuple[Reference, ...]:
        return _unique(self._references_of_rules(step, memory))

    def combine(
        self, inputs: GuidanceInput, memory: tuple[Any, ...] | None
    ) -> tuple[Prediction, tuple[Any, ...]]:
        references_of_rules = self._references_of_rules(inputs.step, memory)
        # A wrapper may have omitted all references; each rule then gets none.
        predictions = dict(
            zip(_unique(references_of_rules), inputs.references, strict=bool(inputs.references))
        )
        total = conditional = inputs.conditional
        memories = []
        for rule, references, rule_memory in zip(
            self.rules, references_of_rules, self._memories(memory), strict=True
        ):
            available = tuple(predictions[r] for r in references if r in predictions)
            guided, new_memory = rule.combine(inputs._replace(references=available), rule_memory)
            total = _add_difference(total, 1.0, guided, conditional)
            memories.append(new_memory)
        return total, tuple(memories)

    def levels(self, process: Process) -> tuple[float, ...]:
        return tuple(level for rule in self.rules for level in rule.levels(process))

    def check(self, process: Process, condition: Condition) -> None:
        for rule in self.rules:
            rule.check(process, condition)

    def parts(self) -> Iterator[Guidance]:
        yield self
        for rule in self.rules:
            yield from rule.parts()

    def _memories(self, memory: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """The memory of each rule."""
        return (None,) * len(self.rules) if memory is None else memory

    def _references_of_rules(
        self, step: Step, memory: tuple[Any, ...] | None
    ) -> list[tuple[Reference, ...]]:
        """The references that each rule requires."""
        return [
            rule.required_references(step, rule_memory)
            for rule, rule_memory in zip(self.rules, self._memories(memory), strict=True)
        ]


def _add_difference(
    total: Prediction, factor: float, prediction: Prediction, base: Prediction
) -> Prediction:
    """total + factor (prediction - base), on x_0 and on ε alike."""
    return Prediction(
        total.x0 + factor * (prediction.x0 - base.x0),
        total.eps + factor * (prediction.eps - base.eps),
    )


def _unique(references_of_rules: list[tuple[Reference, ...]]) -> tuple[Reference, ...]:
    """All references, equal ones once, in the order of their first occurrence."""
    return tuple(dict.fromkeys(r for references in references_of_rules for r in references))
