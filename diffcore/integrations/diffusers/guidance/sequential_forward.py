"""The forward of a network whose pipeline evaluates the halves of guidance in two calls (Flux).

The pipeline computes n + s (c - n) from the outputs c for the condition, which come first, and n
for the negative. The first output is a tensor that the second call fills: then both are the guided
output F, and F + s (F - F) = F, bit for bit, for every s. Each half is evaluated in its own call,
with its arguments and caches. If the rule needs no negative, the second call does not evaluate the
network.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcore.caches.integration import part
from diffcore.core.denoiser import extract_tensor
from diffcore.core.prediction import Prediction
from diffcore.guidance import Guidance, GuidanceInput, Step, Unconditional, evaluate_queries
from diffcore.guidance.reference import Query
from diffcore.integrations.diffusers.guidance.joint_forward import (
    CallState,
    GuidedForward,
    guided_output,
)
from diffcore.integrations.diffusers.guidance.pipeline_denoiser import PipelineDenoiser
from diffcore.integrations.diffusers.scheduler.call import PipelineCall

__all__ = ["ConditionalHalf", "SequentialGuidedForward"]


@dataclass
class ConditionalHalf:
    """Results of the first call.

    Args:
        output: the network output that the pipeline received; the second call may fill it.
        conditional: the conditional prediction.
        references: index of each reference that is not the negative -> its prediction.
    """

    output: Any
    conditional: Prediction
    references: dict[int, Prediction]


class SequentialGuidedForward(GuidedForward):
    """A `GuidedForward` for pipelines that pass one half in each call.

    Whether the pipeline calls the network for the negative half is known only when it does so: if
    it does not, and the rule needs it, the scheduler's next step raises the error.
    """

    def _evaluate(
        self, rule: Guidance, denoiser: PipelineDenoiser, step: Step, state: CallState
    ) -> Any:
        evaluate = self._evaluate_first if state.evaluation is None else self._evaluate_second
        return evaluate(rule, denoiser, step, state)

    def _evaluate_first(
        self, rule: Guidance, denoiser: PipelineDenoiser, step: Step, state: CallState
    ) -> Any:
        x, references = denoiser.sample(step.level), rule.required_references(step, state.memory)
        indices = [
            i for i, reference in enumerate(references) if not isinstance(reference, Unconditional)
        ]
        queries = [
            Query(denoiser, None),
            *(references[i].query(denoiser, None, x) for i in indices),
        ]
        part(0)
        conditional, *others = evaluate_queries(queries, x, step.level)
        half = ConditionalHalf(None, conditional, dict(zip(indices, others, strict=True)))
        if len(indices) == len(references):
            given = GuidanceInput(x, step, conditional, tuple(others))
            half.output = denoiser.pipeline_output(guided_output(rule, given, state))
        else:
            half.output = denoiser.pipeline_output(torch.full_like(x, torch.nan))
            state.waiting_rule = rule
        state.evaluation = half
        return half.output

    def _evaluate_second(
        self, rule: Guidance, denoiser: PipelineDenoiser, step: Step, state: CallState
    ) -> Any:
        half: ConditionalHalf = state.evaluation
        if state.waiting_rule is None:
            return half.output
        x = denoiser.sample(step.level)
        part(1)  # a cache keeps the features of each half
        negative = denoiser(x, step.level)
        indices = range(len(rule.required_references(step, state.memory)))
        references = tuple(half.references.get(i, negative) for i in indices)
        given = GuidanceInput(x, step, half.conditional, references)
        extract_tensor(half.output).copy_(guided_output(rule, given, state))
        state.waiting_rule = None
        return half.output

    def _still_has_both_halves(self, state: CallState, count: int) -> bool:
        return False  # each call has one half

    def _begin(self, call: PipelineCall, x: Tensor, labels: Tensor | None) -> CallState:
        knots = call.knots
        self._check_guidance(call, knots, has_both=True)
        return CallState(call.plan.process, knots, False, len(x), self.family.guidance_argument)
