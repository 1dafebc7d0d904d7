"""The forward of a network that its pipeline asks twice at a level, about the condition and then about its negative (Flux).

The pipeline makes n + s (c - n) of the two answers. The first one is a tensor that the second call fills: both are the guided
output F then, and F + s (F - F) = F, bit for bit and whatever s is. Each half is asked about in its own call, where its caches
and arguments are; where the rule needs no negative, the second call is answered without the network.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcore.core.denoiser import tensor_of
from diffcore.core.prediction import Prediction
from diffcore.guidance import Guidance, GuidanceInput, Unconditional, evaluate_queries
from diffcore.guidance.reference import Query
from diffcore.integrations.diffusers.guidance.joint_forward import Asked, Guided, Progress, guide
from diffcore.integrations.diffusers.scheduler.plan import Call


@dataclass
class First:
    """What the first call found.

    Args:
        answer: what the pipeline got.
        conditional: the prediction.
        others: of the references that are not the negative, by their place.
    """

    answer: Any
    conditional: Prediction
    others: dict[int, Prediction]


class InTurn(Guided):
    """A network's forward under a rule, asked about one half at a time."""

    def _answer(self, rule: Guidance, asked: Asked, progress: Progress) -> Any:
        return (
            self._first(rule, asked, progress)
            if progress.asked is None
            else self._second(rule, asked, progress)
        )

    def _first(self, rule: Guidance, asked: Asked, progress: Progress) -> Any:
        step = progress.step
        assert step is not None
        x, references = asked.sample(step.level), rule.required_references(step, progress.memory)
        there = [
            i for i, reference in enumerate(references) if not isinstance(reference, Unconditional)
        ]
        queries = [Query(asked, None), *(references[i].query(asked, None, x) for i in there)]
        conditional, *others = evaluate_queries(queries, x, step.level)
        found = First(None, conditional, dict(zip(there, others, strict=True)))
        if len(there) == len(references):
            found.answer = asked.answered(
                guide(rule, GuidanceInput(x, step, conditional, tuple(others)), progress)
            )
        else:
            found.answer, progress.waits = asked.answered(torch.full_like(x, torch.nan)), rule
        progress.asked = found
        return found.answer

    def _second(self, rule: Guidance, asked: Asked, progress: Progress) -> Any:
        first, step = progress.asked, progress.step
        if progress.waits is None:
            return first.answer
        assert step is not None
        x = asked.sample(step.level)
        negative = asked(x, step.level)
        places = range(len(rule.required_references(step, progress.memory)))
        seen = GuidanceInput(
            x, step, first.conditional, tuple(first.others.get(i, negative) for i in places)
        )
        tensor_of(first.answer).copy_(guide(rule, seen, progress))
        progress.waits = None
        return first.answer

    def _begun(self, call: Call, x: Tensor, labels: Tensor | None) -> Progress:
        """That the negative half comes is known when it does; a call has the rows of one."""
        self._checked(call, True)
        return Progress(call.plan.process)
