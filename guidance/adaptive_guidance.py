"""Adaptive guidance and LinearAG: rules that evaluate the reference in fewer steps.

Both are from Castillo et al. 2023 (2312.12487). AdaptiveGuidance stops the evaluation of the
reference once it agrees with the conditional prediction. LinearAG predicts the reference from past
predictions.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffcore.core.prediction import Prediction, PredictionType, expand_per_sample, predict, target
from diffcore.guidance.base import (
    Guidance,
    GuidanceInput,
    GuidanceWrapper,
    Step,
    check_space,
    outputs,
)
from diffcore.guidance.reference import Reference

__all__ = ["AdaptiveGuidance", "AdaptiveGuidanceMemory", "LinearAG", "LinearAGMemory"]

AgreementSpace = Literal["v_prediction", "sample"]

OutputPair = tuple[Tensor, Tensor]
"""(F_c, F_ref): the conditional prediction and the reference as a quantity F, each (B, *shape)."""


class AdaptiveGuidanceMemory(NamedTuple):
    """State of AdaptiveGuidance.

    Args:
        has_agreed: (B,) True for samples that are no longer guided.
        inner: state of the rule inside.
    """

    has_agreed: Tensor
    inner: Any


@dataclass(frozen=True)
class AdaptiveGuidance(GuidanceWrapper[AdaptiveGuidanceMemory]):
    """Adaptive guidance applies the rule inside until both predictions agree.

        cos(F_c, F_ref) ≥ threshold:   the conditional model from the next evaluation on

    Source: Castillo et al. 2023 (2312.12487). Each sample stops by its own cosine, so a sample
    does not depend on the others. The reference is no longer evaluated once all samples of the
    batch have stopped, so smaller batches save more. The smaller call of the network then changes
    last bits: use calls of a fixed size where bits matter.

    The paper measures ε and stops at 0.991. There the cosine is above 0.992 at λ ≤ -3 whatever the
    images are, as both predictions are nearly x, so guidance would stop at the first step. On v the
    cosine rises with λ; on a trained network it may fall again where the noise is small. Calibrate
    the threshold on your model with `AdaptiveGuidance.cosine` over `diffcore.sampling.loop.watch`.

    The decision needs data: until it has stopped, each evaluation reads one boolean from the
    device.

    Args:
        inner: rule that is wrapped; it has one reference.
        threshold: cosine within (-1, 1] at which a sample stops.
        space: quantity F that is compared.
    """

    threshold: float = 0.991
    space: AgreementSpace = "v_prediction"

    incompatible_rules: ClassVar[dict[str, str]] = {
        "AdaptiveGuidance": "it would stop twice; use one, with the smaller threshold",
        "ClassifierGuidance": "it has no reference that could be left out; use Interval",
        "ComposedConditions": "its references do not agree at one time; use Interval",
        "ScaledConditions": "its references do not agree at one time; use Interval",
        "Sum": "its references do not agree at one time; use Sum of AdaptiveGuidance",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.threshold <= 1:
            raise ValueError(
                f"threshold is {self.threshold}, expected a cosine within (-1, 1], such as 0.991"
            )
        if self.space not in get_args(AgreementSpace):
            raise ValueError(f"space is {self.space!r}, expected v_prediction or sample")

    @property
    def depends_on_steps(self) -> bool:
        return True

    def required_references(
        self, step: Step, memory: AdaptiveGuidanceMemory | None
    ) -> tuple[Reference, ...]:
        references = self.inner.required_references(step, None if memory is None else memory.inner)
        if memory is None or not references:
            return references
        return () if bool(memory.has_agreed.all()) else references

    def combine(
        self, inputs: GuidanceInput, memory: AdaptiveGuidanceMemory | None
    ) -> tuple[Prediction, AdaptiveGuidanceMemory]:
        if memory is None:
            x = inputs.x
            none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            memory = AdaptiveGuidanceMemory(none, None)
        guided, inner = self.inner.combine(inputs, memory.inner)
        stopped = expand_per_sample(memory.has_agreed, inputs.x)
        x0, eps = (
            torch.where(stopped, c, g) for c, g in zip(inputs.conditional, guided, strict=True)
        )
        prediction = Prediction(x0, eps)
        has_agreed = memory.has_agreed
        if inputs.references:
            has_agreed = has_agreed | (self.cosine(inputs) >= self.threshold)
        return prediction, AdaptiveGuidanceMemory(has_agreed, inner)

    def cosine(self, inputs: GuidanceInput) -> Tensor:
        """cos(F_c, F_ref) of each sample, shape (B,); 0 where either is 0."""
        return self.cosine_in(self.space, inputs)

    @staticmethod
    def cosine_in(
        space: Literal["epsilon", "v_prediction", "sample"], inputs: GuidanceInput
    ) -> Tensor:
        """cos(F_c, F_ref) of each sample in any space, shape (B,); 0 where either is 0."""
        F_c, F_ref = outputs(space, inputs.step, inputs.conditional, inputs.references[0])
        return cosine_similarity(F_c.flatten(1), F_ref.flatten(1), dim=1)


class LinearAGMemory(NamedTuple):
    """State of LinearAG.

    Args:
        pairs: (F_c, F_ref) of the past steps, the latest first.
        inner: state of the rule inside.
    """

    pairs: tuple[OutputPair, ...]
    inner: Any


@dataclass(frozen=True)
class LinearAG(GuidanceWrapper[LinearAGMemory]):
    """LinearAG replaces the reference at chosen steps by an affine map of past predictions.

        F_ref,i ≈ b + a_0 F_c,i + Σ_j (a_j F_c,i-j + b_j F_ref,i-j)   at chosen steps i

    Source: Castillo et al. 2023 (2312.12487, section 5). The coefficients are scalars for each
    step, fitted by least squares on some hundred sampled paths (`LinearAG.fit`). Later steps read
    predicted references in place of evaluated ones. The coefficients belong to one sampler with
    one evaluation in each step, one grid and one number of steps. The paper regresses ε; here F
    is v by default, which determines x_0 and ε at each level.

    Args:
        inner: rule that is wrapped; it has one reference.
        coefficients: (b, a_0, a_1, b_1, a_2, b_2, ...) for each step, or () where the reference is
            evaluated.
        space: quantity F that is predicted.
    """

    coefficients: tuple[tuple[float, ...], ...]
    space: PredictionType = "v_prediction"

    incompatible_rules: ClassVar[dict[str, str]] = {
        "LinearAG": "its reference is predicted already; use one LinearAG",
        "AdaptiveGuidance": "agreement with a predicted reference means little; use "
        "AdaptiveGuidance(LinearAG(...))",
        "Interval": "steps outside it leave gaps in the history; use LinearAG alone, or Interval "
        "alone",
        "ClassifierGuidance": "it has no reference to predict; use it alone",
        "ComposedConditions": "it has several references; use CFG or APG inside",
        "ScaledConditions": "it has several references; use CFG or APG inside",
        "Sum": "it has several references; use CFG or APG inside",
        "GFCG": "its reference changes its class; use CFG or APG inside",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficients = tuple(tuple(map(float, row)) for row in self.coefficients)
        object.__setattr__(self, "coefficients", coefficients)
        for i, row in enumerate(coefficients):
            if len(row) % 2 or not all(map(math.isfinite, row)):
                raise ValueError(
                    f"coefficients of step {i} are {row}, expected finite (b, a_0) and two more "
                    "for each past step"
                )
            if len(row) > 2 * (i + 1):
                raise ValueError(
                    f"step {i} has {len(row)} coefficients, expected at most {2 * (i + 1)}: "
                    f"{i} steps are past"
                )

    @property
    def requires_one_evaluation_per_step(self) -> bool:
        return True

    @property
    def depends_on_steps(self) -> bool:
        return True

    def required_references(
        self, step: Step, memory: LinearAGMemory | None
    ) -> tuple[Reference, ...]:
        if step.total != len(self.coefficients):
            raise ValueError(
                f"LinearAG was fitted for {len(self.coefficients)} steps and this run has "
                f"{step.total}: fit it again for this number of steps"
            )
        references = self._inner_references(step, memory)
        if not references or not self.coefficients[step.index]:
            return references
        check_space(self, self.space, step.level)
        return ()

    def combine(
        self, inputs: GuidanceInput, memory: LinearAGMemory | None
    ) -> tuple[Prediction, LinearAGMemory]:
        past = memory or LinearAGMemory((), None)
        row = self.coefficients[inputs.step.index]
        references = self._inner_references(inputs.step, memory)
        if row and references:
            inputs = inputs._replace(references=(self._predict(row, inputs, past.pairs),))
        guided, inner = self.inner.combine(inputs, past.inner)
        if not references:  # a gap: the pairs before it are no longer those of the last steps
            return guided, LinearAGMemory((), inner)
        if not inputs.references:  # a wrapper has stopped the rule, as both predictions agree
            inputs = inputs._replace(references=(inputs.conditional,))
        pairs = (_output_pair(self.space, inputs), *past.pairs)
        return guided, LinearAGMemory(pairs[: self.depth], inner)

    @property
    def depth(self) -> int:
        """Number of past steps that the coefficients read."""
        return max((len(row) // 2 - 1 for row in self.coefficients), default=0)

    @classmethod
    def fit(
        cls,
        rule: Guidance,
        path: Iterable[GuidanceInput],
        skip: Sequence[int] | None = None,
        depth: int = 2,
        space: PredictionType = "v_prediction",
    ) -> "LinearAG":
        """Fit the coefficients by least squares over all samples and elements of a sampled path.

        Args:
            rule: rule inside; it has one reference.
            path: inputs of guidance at each step of a run that evaluates the reference at each step
                (`diffcore.sampling.loop.watch`).
            skip: steps at which the reference is predicted; None takes every second step of the
                first half, from step 1.
            depth: number of past steps that a prediction reads, as far as they exist.
            space: quantity F that is predicted.

        Returns:
            The rule with the fitted coefficients.

        Raises:
            ValueError: the path has a step without the reference.
        """
        pairs = [_output_pair(space, inputs) for inputs in path]
        predicted = range(1, len(pairs) // 2, 2) if skip is None else skip
        coefficients = [
            _least_squares(pairs[max(0, i - depth) : i + 1][::-1]) if i in predicted else ()
            for i in range(len(pairs))
        ]
        return cls(rule, tuple(coefficients), space)

    def _inner_references(self, step: Step, memory: LinearAGMemory | None) -> tuple[Reference, ...]:
        return self.inner.required_references(step, None if memory is None else memory.inner)

    def _predict(
        self, row: tuple[float, ...], inputs: GuidanceInput, past: tuple[OutputPair, ...]
    ) -> Prediction:
        """The reference by the affine map whose coefficients are `row`."""
        if len(row) > 2 * (len(past) + 1):
            raise ValueError(
                f"LinearAG reads {len(row) // 2 - 1} past steps at step {inputs.step.index}, and "
                f"its rule evaluated a reference at {len(past)} of them: use a rule that does so "
                "at each step (w other than 1, zero_init=0)"
            )
        level, sigma_data = inputs.step.level, inputs.step.process.sigma_data
        F = target(self.space, *inputs.conditional.pair, level, sigma_data)
        terms = zip(row[1:], (F, *(value for pair in past for value in pair)), strict=False)
        reference = torch.as_tensor(row[0] + sum(a * term for a, term in terms)).expand_as(F)
        return predict(self.space, reference, inputs.x, level, sigma_data)


def _output_pair(space: PredictionType, inputs: GuidanceInput) -> OutputPair:
    """(F_c, F_ref) of a step; raises ValueError unless it has exactly one reference."""
    if len(inputs.references) != 1:
        raise ValueError(
            "LinearAG needs one reference at each step: use a rule that requires it at each, such "
            "as CFG(4.0)"
        )
    F_c, F_ref = outputs(space, inputs.step, inputs.conditional, *inputs.references)
    return F_c, F_ref


def _least_squares(pairs: Sequence[OutputPair]) -> tuple[float, ...]:
    """(b, a_0, a_1, b_1, ...) that predict F_ref of the first pair from its F_c and past pairs."""
    (F_c, F_ref), past = pairs[0], pairs[1:]
    columns = [torch.ones_like(F_c), F_c, *(value for pair in past for value in pair)]
    A = torch.stack([column.double().flatten().cpu() for column in columns], 1)
    b = F_ref.double().flatten().cpu()[:, None]
    # gelsd: columns may be linearly dependent, as on Gaussians.
    return tuple(torch.linalg.lstsq(A, b, driver="gelsd").solution[:, 0].tolist())
