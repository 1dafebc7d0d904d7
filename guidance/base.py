"""The contract of guidance: a rule combines the conditional prediction with reference predictions.

One convention for the scale holds everywhere: guided = ref + w (cond - ref), so w = 1 is the
conditional model and w = 0 is the reference. Before each evaluation a rule lists, on the host, the
references that it needs; an evaluation that needs none costs one call of the network.
Rules compose by wrapping: Interval(APG(4.0)), Rescale(CFG(7.5)), AdaptiveGuidance(APG(4.0)).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, NamedTuple, Self

import torch
from torch import Tensor
from typing_extensions import TypeVar

from diffcore.core.prediction import Prediction, PredictionType, target
from diffcore.core.process import Process
from diffcore.guidance.reference import Condition, Reference, Unconditional, check_reference
from diffcore.guidance.scale import ScaleLike, check_scale, scale_at
from diffcore.schedules import Level

__all__ = [
    "Contrast",
    "Guidance",
    "GuidanceInput",
    "GuidanceWrapper",
    "Memory",
    "Step",
    "check_inner_rule",
    "check_space",
    "outputs",
]

Memory = TypeVar("Memory", default=Any)
"""Type of the state of a rule between evaluations; None for a rule without state."""


@dataclass(frozen=True)
class Step:
    """One evaluation of a sampler's step from `start` to `end`. All of it is known on the host.

    Args:
        process: process of the network.
        level: level at which the network is evaluated; a knot, or a level between two knots.
        start: level of the first evaluation of the step: the knot that the step leaves, or the
            level to which churn raised it.
        end: knot that the step reaches.
        index: number of the step, from 0.
        total: number of steps between the knots; a sampler that goes back (Restart, RePaint) takes
            more steps than this.
    """

    process: Process
    level: Level
    start: Level
    end: Level
    index: int = 0
    total: int = 1

    @property
    def noisier_end(self) -> Level:
        """The noisier of `start` and `end`: the same level for all evaluations of a step."""
        return self.start if self.start.logsnr <= self.end.logsnr else self.end


class GuidanceInput(NamedTuple):
    """The predictions that a rule combines at one evaluation.

    Args:
        x: (B, *shape) input of the network.
        step: the evaluation: its level, and the step that it belongs to.
        conditional: prediction under the condition.
        references: predictions of the references that the rule required, in the rule's order.
        condition: (B,) labels, or None without a condition.
    """

    x: Tensor
    step: Step
    conditional: Prediction
    references: tuple[Prediction, ...] = ()
    condition: Tensor | None = None


class Guidance(ABC, Generic[Memory]):
    """A rule that combines the predictions at one level into one guided prediction.

    A rule is immutable. Its state, such as the momentum of APG, has the type `Memory` and is passed
    in and out of `combine`; None is the memory at the start of a run.
    """

    @property
    def is_consistent(self) -> bool:
        """Whether the guided prediction satisfies x = α x_0 + σ ε.

        Only samplers whose step is α_s x_0 + σ_s ε accept a rule that does not (CFG++).
        """
        return True

    @property
    def reads_condition(self) -> bool:
        """Whether the rule reads the labels; a network without classes then accepts them too."""
        return False

    @property
    def requires_one_evaluation_per_step(self) -> bool:
        """Whether the rule works only with samplers that evaluate the network once in each step."""
        return False

    @property
    def has_zero_init(self) -> bool:
        """Whether the rule replaces the velocity by 0 in the first steps (CFG-Zero*)."""
        return False

    @property
    def depends_on_steps(self) -> bool:
        """Whether the guided prediction depends on the steps of the sampler beside x and its level.

        Such a rule (momentum, first steps, earlier evaluations) defines no flow that a sampler
        approaches with more steps.
        """
        return not self.is_consistent or self.has_zero_init

    @abstractmethod
    def required_references(self, step: Step, memory: Memory | None) -> tuple[Reference, ...]:
        """List the references that the rule needs at an evaluation; decided on the host.

        Args:
            step: the evaluation.
            memory: state of the rule after the previous evaluation; None at the start of a run.

        Returns:
            The references. With none, the evaluation costs one call of the network.
        """

    @abstractmethod
    def combine(
        self, inputs: GuidanceInput, memory: Memory | None
    ) -> tuple[Prediction, Memory | None]:
        """Combine the conditional prediction and the references.

        A wrapper may omit the references that the rule required; the rule then returns the
        conditional prediction.

        Args:
            inputs: the predictions, and where they were evaluated.
            memory: state of the rule after the previous evaluation; None at the start of a run.

        Returns:
            The guided prediction (the x_0 to step towards, and the ε to renoise with), and the
            state of the rule after this evaluation.
        """

    def guide(
        self, inputs: GuidanceInput, memory: Memory | None
    ) -> tuple[Prediction, Memory | None]:
        """Combine the predictions, with the learned variance v of the conditional prediction.

        A rule acts on x_0 and ε only. That v is the conditional one is the convention of DiT and
        DeepFloyd IF.

        Args:
            inputs: the predictions, and where they were evaluated.
            memory: state of the rule after the previous evaluation; None at the start of a run.

        Returns:
            As `combine`.
        """
        prediction, memory = self.combine(inputs, memory)
        v = inputs.conditional.variance
        return prediction if prediction.variance is v else replace(prediction, variance=v), memory

    def traceable(self, step: Step) -> "Guidance[Memory] | None":
        """The rule at a step in a form that torch.compile traces once for all steps.

        Its `combine` decides nothing from the level, and what depends on the level is a tensor. It
        is used only where the rule requires references; without any, the guided prediction is the
        conditional one.

        Args:
            step: the evaluation.

        Returns:
            The rule, or None (the default) if it has no such form.
        """
        return None

    def first_memory(self, x: Tensor) -> Memory | None:
        """A state at the start of a run that has the same effect as None, and the later shape.

        Args:
            x: (B, *shape) samples.

        Returns:
            The state; None (the default) for a rule without state.
        """
        return None

    def levels(self, process: Process) -> tuple[float, ...]:
        """The λ at which the rule switches on or off. They should be knots.

        Returns:
            Values of λ, in no particular order.
        """
        return ()

    def check(self, process: Process, condition: Condition) -> None:
        """Check that the rule can guide a network of this process.

        Raises:
            ValueError: the rule needs a condition and there is none; the message has the remedy.
        """
        return

    def parts(self) -> Iterator["Guidance"]:
        """Iterate over the rule and all rules inside it.

        Yields:
            The rule itself first, then the rules that it holds.
        """
        yield self


@dataclass(frozen=True)
class Contrast(Guidance[Memory]):
    """A rule with one reference and a scale w. At w = 1 it is the conditional model, bit for bit.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        reference: prediction to extrapolate away from; by default the unconditional one.
    """

    scale: ScaleLike = 1.0
    reference: Reference = Unconditional()

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_reference(self.reference)

    def required_references(self, step: Step, memory: Memory | None) -> tuple[Reference, ...]:
        return () if scale_at(self.scale, step.level) == 1 else (self.reference,)

    def combine(
        self, inputs: GuidanceInput, memory: Memory | None
    ) -> tuple[Prediction, Memory | None]:
        if not inputs.references:
            return inputs.conditional, memory
        w: Any = self.scale  # a tensor in the rule of `with_scale_at`
        if not isinstance(w, Tensor):
            w = scale_at(w, inputs.step.level)
        return self.extrapolate(inputs, inputs.references[0], w, memory)

    def with_scale_at(self, step: Step) -> Self:
        """The rule with the scale that it has at a step: a number if it is constant, else a tensor.

        Args:
            step: the evaluation.

        Returns:
            The rule.
        """
        if not callable(self.scale):
            return self
        rule, w = copy(self), scale_at(self.scale, step.level)
        object.__setattr__(rule, "scale", torch.tensor(w, dtype=torch.float64))
        return rule

    @abstractmethod
    def extrapolate(
        self, inputs: GuidanceInput, reference: Prediction, scale: float, memory: Memory | None
    ) -> tuple[Prediction, Memory | None]:
        """Extrapolate from the reference beyond the conditional prediction.

        Args:
            inputs: the predictions, and where they were evaluated.
            reference: prediction of the reference.
            scale: w at this level, not 1.
            memory: state of the rule after the previous evaluation; None at the start of a run.

        Returns:
            The guided prediction, and the state of the rule after this evaluation.
        """


@dataclass(frozen=True)
class GuidanceWrapper(Guidance[Memory]):
    """A rule around another rule.

    Args:
        inner: rule that is wrapped, with its options.
    """

    inner: Guidance

    incompatible_rules: ClassVar[dict[str, str]] = {}
    """Class names of rules that the wrapper cannot hold at any depth, and the remedy for each."""

    def __post_init__(self) -> None:
        check_inner_rule(self.inner)
        for part in self.inner.parts():
            for name in (base.__name__ for base in type(part).__mro__):
                if name in self.incompatible_rules:
                    raise ValueError(
                        f"{type(self).__name__} cannot hold {type(part).__name__}: "
                        f"{self.incompatible_rules[name]}"
                    )

    @property
    def is_consistent(self) -> bool:
        return self.inner.is_consistent

    @property
    def reads_condition(self) -> bool:
        return self.inner.reads_condition

    @property
    def requires_one_evaluation_per_step(self) -> bool:
        return self.inner.requires_one_evaluation_per_step

    @property
    def has_zero_init(self) -> bool:
        return self.inner.has_zero_init

    @property
    def depends_on_steps(self) -> bool:
        return self.inner.depends_on_steps

    def levels(self, process: Process) -> tuple[float, ...]:
        return self.inner.levels(process)

    def check(self, process: Process, condition: Condition) -> None:
        self.inner.check(process, condition)

    def parts(self) -> Iterator[Guidance]:
        yield self
        yield from self.inner.parts()


def check_inner_rule(rule: Any) -> None:
    """Check that a rule holds a guidance rule, and not a class of rules or a number.

    Raises:
        TypeError: it is something else; the message has an example.
    """
    if not isinstance(rule, Guidance):
        raise TypeError(f"rule is {rule!r}, expected a guidance rule such as CFG(2.0)")


def check_space(rule: Guidance, space: PredictionType, level: Level) -> None:
    """Check that x and a quantity F of this space determine x_0 and ε at a level.

    Args:
        rule: rule that works on F; its name begins the message.
        space: the quantity F. ε does not determine x_0 at pure noise, x_0 not ε at clean data.
        level: level of the evaluation.

    Raises:
        ValueError: F does not determine both there; the message has the remedy.
    """
    noisiest, cleanest = level.logsnr_range
    if (space == "epsilon" and noisiest == -math.inf) or (
        space == "sample" and cleanest == math.inf
    ):
        raise ValueError(
            f"{type(rule).__name__} works on {space}, which does not give x_0 and ε at "
            f"λ = {float(level.logsnr):g}: use space='v_prediction', or knots of finite λ"
        )


def outputs(space: PredictionType, step: Step, *predictions: Prediction) -> tuple[Tensor, ...]:
    """The network output F (B, *shape) of each prediction at the level of a step.

    Args:
        space: prediction type of F.
        step: step of the evaluation.
        *predictions: predictions at its level.

    Returns:
        One F for each prediction.
    """
    sigma_data = step.process.sigma_data
    return tuple(target(space, *p.pair, step.level, sigma_data) for p in predictions)
