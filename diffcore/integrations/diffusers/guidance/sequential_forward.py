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

from diffcore.core.denoiser import extract_tensor
from diffcore.core.prediction import Prediction
from diffcore.guidance import Guidance, GuidanceInput, Unconditional, evaluate_queries
from diffcore.guidance.reference import Query
from diffcore.integrations.diffusers.guidance.joint_forward import (
    CallState,
    GuidedForward,
    PipelineDenoiser,
    guided_output,
)
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
    """A network's forward with a guidance rule, for pipelines that pass one half in each call.

    Args:
        network: the network.
        forward: the network's original forward.
        scheduler: the pipeline's DiffcoreScheduler, which knows the noise level.
        guidance: the rule.
        family: the record of the pipeline's family.
        has_negative_half: not used; whether the second call comes is known when it does.
    """

    def _evaluate(self, rule: Guidance, denoiser: PipelineDenoiser, state: CallState) -> Any:
        evaluate = self._evaluate_first if state.evaluation is None else self._evaluate_second
        return evaluate(rule, denoiser, state)

    def _evaluate_first(self, rule: Guidance, denoiser: PipelineDenoiser, state: CallState) -> Any:
        step = state.step
        assert step is not None
        x, references = denoiser.sample(step.level), rule.required_references(step, state.memory)
        indices = [
            i for i, reference in enumerate(references) if not isinstance(reference, Unconditional)
        ]
        queries = [
            Query(denoiser, None),
            *(references[i].query(denoiser, None, x) for i in indices),
        ]
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

    def _evaluate_second(self, rule: Guidance, denoiser: PipelineDenoiser, state: CallState) -> Any:
        half: ConditionalHalf = state.evaluation
        step = state.step
        if state.waiting_rule is None:
            return half.output
        assert step is not None
        x = denoiser.sample(step.level)
        negative = denoiser(x, step.level)
        indices = range(len(rule.required_references(step, state.memory)))
        references = tuple(half.references.get(i, negative) for i in indices)
        given = GuidanceInput(x, step, half.conditional, references)
        extract_tensor(half.output).copy_(guided_output(rule, given, state))
        state.waiting_rule = None
        return half.output

    def _begin(self, call: PipelineCall, x: Tensor, labels: Tensor | None) -> CallState:
        # Whether the negative half comes is known only when it does; each call has B samples.
        self._checked_process(call, has_both=True)
        return CallState(call.plan.process, self.family.guidance_argument)
