"""A denoiser that torch.compile compiles with its guidance rule, once for all noise levels."""

from typing import Any

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, labels_of
from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import Prediction
from diffcore.guidance import Guidance, GuidanceInput, Step
from diffcore.guidance.evaluation import (
    GuidingDenoiser,
    concatenate_conditions,
    list_queries,
    select_rows,
    split_prediction,
)
from diffcore.sampling.loop import evaluate_references
from diffcore.schedules import Level
from diffcore.schedules.base import Real

__all__ = ["CompiledDenoiser"]


class CompiledDenoiser(GuidingDenoiser):
    """A denoiser whose network, arithmetic and guidance rule are compiled once, without breaks.

    With the level as Python floats, a compiled denoiser is compiled again when they first change,
    and once more for each value that a branch compares. Here α, σ, λ, t and a scale that varies
    are inputs of the graph. There is one graph for evaluations without references, and one for
    those with them, which also contains the rule. So guidance in an interval has two.

    The rule is part of the graph if it is CFG, APG or one of them in Interval, and its references
    are of the guided network (Unconditional, Label, Without). Any other rule combines the compiled
    predictions outside of it, as all rules do with `micro_batch`.

    Args:
        denoiser: network with its process.
        backend: backend of torch.compile.

    Example:
        sample(CompiledDenoiser(Run("runs/digits").denoiser()), seeds=range(64))
    """

    def __init__(self, denoiser: Denoiser, backend: Any = "inductor") -> None:
        super().__init__(denoiser)

        def guided(
            rule: Guidance,
            x: Tensor,
            level: Level,
            condition: BatchCondition | None,
            labels: Tensor | None,
            memory: Any,
        ) -> tuple[Prediction, Any]:
            rows = len(level.logsnr)  # type: ignore[arg-type]  # it is a map
            count = rows // len(x)
            together = denoiser.forward(torch.cat([x] * count), level, condition)
            conditional, *references = split_prediction(together, count)
            own = select_rows(level.to(x), slice(len(x)), rows)
            step = Step(denoiser.process, own, own, own)
            inputs = GuidanceInput(x, step, conditional, tuple(references), labels)
            return rule.guide(inputs, memory)

        options = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._compiled = torch.compile(denoiser.forward, **options)
        self._guided = torch.compile(guided, **options)

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        result: Prediction = self._compiled(x, _as_map(level, x, len(x)), condition)
        return result

    def guided_prediction(
        self,
        rule: Guidance,
        x: Tensor,
        condition: BatchCondition | None,
        memory: Any,
        step: Step,
        micro_batch: int,
    ) -> tuple[Prediction, Any, int]:
        references, traceable = rule.required_references(step, memory), rule.traceable(step)
        queries = list_queries(self, references, x, condition)
        is_own = all(query.denoiser is self for query in queries)
        if not references or traceable is None or not is_own or micro_batch:
            inputs = evaluate_references(self, rule, x, condition, memory, step, micro_batch)
            return *rule.guide(inputs, memory), len(queries)
        memory = traceable.first_memory(x) if memory is None else memory
        prediction, memory = self._guided(
            traceable,
            x,
            _as_map(step.level, x, len(queries) * len(x)),
            concatenate_conditions(queries, x),
            labels_of(condition),
            memory,
        )
        return prediction, memory, len(queries)


def _as_map(level: Level, x: Tensor, rows: int) -> Level:
    """The level as float64 host tensors (rows, 1, ..., 1); a map of levels is repeated."""
    end = None if level.end is None else _as_map(level.end, x, rows)
    logsnr, t, alpha, sigma = (
        _rows(value, x, rows) for value in (level.logsnr, level.t, level.alpha, level.sigma)
    )
    return Level(logsnr, t, alpha, sigma, level.schedule, end)


def _rows(value: Real, x: Tensor, rows: int) -> Tensor:
    if isinstance(value, Tensor):
        return torch.cat([value] * (rows // len(x))) if len(value) == len(x) else value
    return torch.full((rows, *[1] * (x.ndim - 1)), float(value), dtype=torch.float64)
