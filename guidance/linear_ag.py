"""LinearAG: the reference predicted from past predictions instead of asked."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffcore.core.prediction import Prediction, PredictionType, predict, target
from diffcore.guidance.base import Guidance, GuidanceInput, GuidanceWrapper, Step, check_space
from diffcore.guidance.reference import Reference

Pair = tuple[Tensor, Tensor]


class History(NamedTuple):
    """What LinearAG remembers.

    Args:
        pairs: (F_c, F_ref) of the last steps, the latest first.
        inside: memory of the rule inside.
    """

    pairs: tuple[Pair, ...]
    inside: Any


@dataclass(frozen=True)
class LinearAG(GuidanceWrapper):
    """F_ref,i ≈ b + a_0 F_c,i + Σ_j (a_j F_c,i-j + b_j F_ref,i-j): at chosen steps i the reference is an affine map.

    Castillo et al. 2023 (2312.12487, section 5): coefficients are scalars for each step, fitted by least squares on some
    hundred sampled paths (`LinearAG.fit`), and predicted references stand in for asked ones in later steps. They belong to
    one sampler of one evaluation a step, one grid and one number of steps.

    The paper regresses ε; here F is v by default, which can be converted at every level.

    Args:
        inner: the rule inside, of one reference.
        coefficients: for each step (b, a_0, a_1, b_1, a_2, b_2, ...), or nothing where the reference is asked.
        space: the quantity F.
    """

    coefficients: tuple[tuple[float, ...], ...]
    space: PredictionType = "v_prediction"
    once_a_step = True

    refuses: ClassVar[dict[str, str]] = {
        name: remedy
        for names, remedy in (
            (("LinearAG",), "its reference is predicted already; use one"),
            (
                ("AdaptiveGuidance",),
                "agreement with a predicted reference says little; use AdaptiveGuidance(LinearAG(...))",
            ),
            (
                ("Interval",),
                "steps outside it leave gaps in the history; use LinearAG alone, or Interval alone",
            ),
            (("ClassifierGuidance",), "it has no reference to predict; use it alone"),
            (("Composed", "Sum"), "it has several references; use CFG or APG inside"),
            (("GFCG",), "its reference changes its class; use CFG or APG inside"),
        )
        for name in names
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "coefficients", tuple(tuple(map(float, row)) for row in self.coefficients)
        )
        for i, row in enumerate(self.coefficients):
            if len(row) % 2 or not all(map(math.isfinite, row)):
                raise ValueError(
                    f"coefficients of step {i} are {row}, expected finite (b, a_0) and two more for each past step"
                )
            if len(row) > 2 * (i + 1):
                raise ValueError(
                    f"coefficients of step {i} are {len(row)}, expected at most {2 * (i + 1)}: {i} steps are past"
                )

    def required_references(self, step: Step, memory: History | None) -> tuple[Reference, ...]:
        if step.total != len(self.coefficients):
            raise ValueError(
                f"LinearAG was fitted for {len(self.coefficients)} steps and this run has {step.total}: fit it again for these"
            )
        wanted = self._inside(step, memory)
        if not wanted or not self.coefficients[step.index]:
            return wanted
        check_space(self, self.space, step.level)
        return ()

    def combine(self, seen: GuidanceInput, memory: History | None) -> tuple[Prediction, History]:
        past = memory or History((), None)
        row = self.coefficients[seen.step.index]
        wanted = self._inside(seen.step, memory)
        if row and wanted:
            seen = seen._replace(references=(self._predicted(row, seen, past.pairs),))
        guided, inside = self.inner.combine(seen, past.inside)
        if not wanted:  # a gap: what is before it is no longer the last steps
            return guided, History((), inside)
        if not seen.references:  # a rule around this one has stopped, as both agree
            seen = seen._replace(references=(seen.conditional,))
        return guided, History((_pair(self.space, seen), *past.pairs)[: self.depth], inside)

    @property
    def depth(self) -> int:
        """Past steps that any row reads."""
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
        """Coefficients by least squares over all rows and elements of a sampled path, for the steps of `skip`.

        Args:
            rule: the rule inside.
            path: what was seen at each step of a run with the reference always asked (`diffcore.sampling.loop.watch`).
            skip: steps at which the reference is to be predicted; every other one of the first half by default, from 1.
            depth: past steps that a prediction reads, as far as there are some.
            space: the quantity F.
        """
        pairs = [_pair(space, seen) for seen in path]
        chosen = range(1, len(pairs) // 2, 2) if skip is None else skip
        rows = [
            _fitted(pairs[max(0, i - depth) : i + 1][::-1]) if i in chosen else ()
            for i in range(len(pairs))
        ]
        return cls(rule, tuple(rows), space)

    def _inside(self, step: Step, memory: History | None) -> tuple[Reference, ...]:
        return self.inner.required_references(step, None if memory is None else memory.inside)

    def _predicted(
        self, row: tuple[float, ...], seen: GuidanceInput, past: tuple[Pair, ...]
    ) -> Prediction:
        if len(row) > 2 * (len(past) + 1):
            raise ValueError(
                f"LinearAG reads {len(row) // 2 - 1} past steps at step {seen.step.index}, and its rule asked for a reference "
                f"at {len(past)} of them: use a rule that asks at every step (w other than 1, zero_init=0)"
            )
        level, sigma_data = seen.step.level, seen.step.process.sigma_data
        F = target(self.space, *seen.conditional, level, sigma_data)
        terms = zip(row[1:], (F, *(value for pair in past for value in pair)), strict=False)
        reference = row[0] + sum(a * term for a, term in terms)
        return predict(
            self.space, torch.as_tensor(reference).expand_as(F), seen.x, level, sigma_data
        )


def _pair(space: PredictionType, seen: GuidanceInput) -> Pair:
    if len(seen.references) != 1:
        raise ValueError(
            "LinearAG needs the one reference at every step: use a rule that always asks, such as CFG(4.0)"
        )
    F_c, F_ref = (
        target(space, *p, seen.step.level, seen.step.process.sigma_data)
        for p in (seen.conditional, *seen.references)
    )
    return F_c, F_ref


def _fitted(pairs: Sequence[Pair]) -> tuple[float, ...]:
    """(b, a_0, a_1, b_1, ...) that predict the reference of the first pair from its conditional and the other pairs."""
    (F_c, F_ref), past = pairs[0], pairs[1:]
    columns = [torch.ones_like(F_c), F_c, *(value for pair in past for value in pair)]
    A = torch.stack([column.double().flatten().cpu() for column in columns], 1)
    return tuple(
        torch.linalg.lstsq(A, F_ref.double().flatten().cpu()[:, None], driver="gelsd")
        .solution[:, 0]
        .tolist()
    )
