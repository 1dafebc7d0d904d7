"""Guidance: a rule that combines the conditional prediction with what it moves away from.

One convention for the scale: guided = reference + w (conditional - reference); w = 1 is the conditional model, w = 0 the
reference. Before a step a rule says, on the host, which references it needs; a step that needs none costs one evaluation.
Rules that hold a rule compose: Interval(APG(4.0)), Rescale(CFG(7.5)), AdaptiveGuidance(APG(4.0)).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from diffcore.core.prediction import Prediction, PredictionType
from diffcore.core.process import Process
from diffcore.guidance.reference import Condition, Reference, Unconditional, check_reference
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at
from diffcore.schedules import Level


class Step(NamedTuple):
    """Where a run asks: at `level`, on its way from `start` to the knot `end`. All of it is known on the host.

    Args:
        process: of the network.
        level: asked about; a knot, or a level between them.
        start: what was asked about first in the step: the knot that it leaves, or the level to which churn raised it.
        end: the knot that it reaches.
        index: of the step, from 0.
        total: number of steps between the knots; a sampler that goes back (Restart, RePaint) takes more.
    """

    process: Process
    level: Level
    start: Level
    end: Level
    index: int = 0  # type: ignore[assignment]  # a tuple's own index() is not used
    total: int = 1

    @property
    def noisier(self) -> Level:
        """The noisier end of the step: one level a step, whichever way it goes and wherever it asks."""
        return self.start if self.start.logsnr <= self.end.logsnr else self.end


class GuidanceInput(NamedTuple):
    """What a rule sees at one level.

    Args:
        x: what the network was asked about, (B, *shape).
        step: where.
        conditional: the prediction under the condition.
        references: those that the rule asked for, in its order.
        condition: (B,) labels, or nothing.
    """

    x: Tensor
    step: Step
    conditional: Prediction
    references: tuple[Prediction, ...] = ()
    condition: Tensor | None = None


class Guidance(ABC):
    """A rule that turns what is seen at a level into one prediction. Immutable: what it remembers is passed in and out."""

    consistent: bool = True
    """Whether x = α x_0 + σ ε holds for what the rule returns; where it does not, only first-order samplers take it."""

    reads_condition: bool = False
    """Whether the rule itself reads the labels, so that they serve a network without classes too."""

    once_a_step: bool = False
    """Whether the rule counts on one evaluation a step."""

    @abstractmethod
    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        """The references needed at this step, decided on the host; with none the step costs one evaluation."""

    @abstractmethod
    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        """The x_0 to step towards and the ε to renoise with, and the rule's memory; None is the memory of a new run."""

    def levels(self, process: Process) -> tuple[float, ...]:
        """Values of λ that should be knots, where the rule changes its mode."""
        return ()

    def check(self, process: Process, condition: Condition) -> None:
        """Raise ValueError where this rule cannot guide a network of this process, with the remedy."""
        return

    def parts(self) -> Iterator["Guidance"]:
        """The rule and all that it holds."""
        yield self


@dataclass(frozen=True)
class Contrast(Guidance):
    """A rule of one reference and a scale w; at w = 1 the conditional model, bit for bit, at one evaluation.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        reference: what to move away from.
    """

    scale: ScaleLike = 1.0
    reference: Reference = Unconditional()

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_reference(self.reference)

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return () if scale_at(self.scale, step.level) == 1 else (self.reference,)

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        if not seen.references:
            return seen.conditional, memory
        return self.extrapolate(
            seen, seen.references[0], scale_at(self.scale, seen.step.level), memory
        )

    @abstractmethod
    def extrapolate(
        self, seen: GuidanceInput, reference: Prediction, scale: float, memory: Any
    ) -> tuple[Prediction, Any]:
        """The guided prediction where w is not 1."""


@dataclass(frozen=True)
class GuidanceWrapper(Guidance):
    """A rule that holds a rule.

    Args:
        inner: the rule inside.
    """

    inner: Guidance

    refuses: ClassVar[dict[str, str]] = {}
    """Names of rules that may not be anywhere inside, and the remedy for each."""

    def __post_init__(self) -> None:
        check_rule(self.inner)
        for part in self.inner.parts():
            for name in (kind.__name__ for kind in type(part).__mro__):
                if name in self.refuses:
                    raise ValueError(
                        f"{type(self).__name__} cannot hold {type(part).__name__}: {self.refuses[name]}"
                    )

    @property
    def consistent(self) -> bool:  # type: ignore[override]
        return self.inner.consistent

    @property
    def reads_condition(self) -> bool:  # type: ignore[override]
        return self.inner.reads_condition

    @property
    def once_a_step(self) -> bool:  # type: ignore[override]
        return self.inner.once_a_step

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return self.inner.required_references(step, memory)

    def levels(self, process: Process) -> tuple[float, ...]:
        return self.inner.levels(process)

    def check(self, process: Process, condition: Condition) -> None:
        self.inner.check(process, condition)

    def parts(self) -> Iterator[Guidance]:
        yield self
        yield from self.inner.parts()


def check_rule(rule: Any) -> None:
    """Raise where a rule is to hold something else, such as a class of rules or a number."""
    if not isinstance(rule, Guidance):
        raise TypeError(f"rule is {rule!r}, expected a guidance rule such as CFG(2.0)")


def check_space(rule: Guidance, kind: PredictionType, level: Level) -> None:
    """Raise where F of this kind and x do not give x_0 and ε: ε at pure noise, x_0 at clean data."""
    noisiest, cleanest = level.logsnr_range
    if (kind == "epsilon" and noisiest == -math.inf) or (kind == "sample" and cleanest == math.inf):
        raise ValueError(
            f"{type(rule).__name__} works on {kind}, which does not give x_0 and ε at λ = {float(level.logsnr):g}: "
            f"use space='v_prediction', or knots of finite λ"
        )


def extrapolated(
    reference: Prediction, conditional: Prediction, scale: float | Tensor
) -> Prediction:
    """Reference + w (conditional - reference), on x_0 and on ε alike, so x = α x_0 + σ ε holds if it held for both."""
    return Prediction(*(r + scale * (c - r) for r, c in zip(reference, conditional, strict=True)))


def moved(prediction: Prediction, change: Tensor, level: Level) -> Prediction:
    """The prediction with its x_0 changed, and the ε that keeps x = α x_0 + σ ε; where σ = 0, x is x_0 and nothing moves."""
    if level.sigma == 0:
        return prediction
    return Prediction(prediction.x0 + change, prediction.eps - (level.alpha / level.sigma) * change)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each row, (B, 1, ...)."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to meet x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
