"""The evaluation of a network under several conditions, which share one forward."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffcore.caches.integration import part
from diffcore.core.conditions import BatchCondition, as_conditions, concatenate
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Guidance, Step
from diffcore.guidance.reference import Query, Reference
from diffcore.schedules import Level

__all__ = [
    "GuidingDenoiser",
    "concatenate_conditions",
    "evaluate_queries",
    "list_queries",
    "select_rows",
    "split_prediction",
]


class GuidingDenoiser(DenoiserWrapper, ABC):
    """A denoiser that evaluates the references of a rule and combines them itself.

    The sampling loop calls `guided_prediction` in place of its own.
    """

    @abstractmethod
    def guided_prediction(
        self,
        rule: Guidance,
        x: Tensor,
        condition: BatchCondition | None,
        memory: Any,
        step: Step,
        micro_batch: int,
    ) -> tuple[Prediction, Any, int]:
        """Evaluate the network and the references, and combine them.

        Args:
            rule: guidance rule.
            x: (B, *shape) samples at the level of the step.
            condition: (B,) labels or `Conditions`, or None.
            memory: memory of the rule; None at the first evaluation.
            step: step of the evaluation.
            micro_batch: number of samples in each call of the network; 0 for one call.

        Returns:
            The guided prediction, the memory of the rule after it, and the number of network
            evaluations: 1, and 1 for each reference.
        """


def list_queries(
    denoiser: DenoiserProtocol,
    references: Sequence[Reference],
    x: Tensor,
    condition: BatchCondition | None,
) -> list[Query]:
    """The queries of an evaluation, the conditional one first.

    Args:
        denoiser: network with its process.
        references: references that a rule requires.
        x: (B, *shape) input of the networks.
        condition: (B,) labels or `Conditions`, or None.

    Returns:
        One query, and one for each reference.
    """
    own = condition if denoiser.process.dropouts else None  # labels may be for the rule alone
    return [Query(denoiser, own), *(item.query(denoiser, own, x) for item in references)]


def evaluate_queries(
    queries: Sequence[Query], x: Tensor, level: Level, micro_batch: int = 0
) -> list[Prediction]:
    """Evaluate the queries at one level. Queries to one denoiser share one forward.

    Args:
        queries: networks and conditions.
        x: (B, *shape) input of each network.
        level: level of x.
        micro_batch: number of samples in each call of a network; 0 puts all into one call.

    Returns:
        The prediction of each query, in the order of the queries.
    """
    if len(queries) == 1:
        return _evaluate_together(queries, x, level, micro_batch)
    predictions: dict[int, Prediction] = {}
    for i, query in enumerate(queries):
        if i not in predictions:
            same = [j for j in range(i, len(queries)) if queries[j].denoiser is query.denoiser]
            results = _evaluate_together([queries[j] for j in same], x, level, micro_batch)
            predictions.update(zip(same, results, strict=True))
    return [predictions[i] for i in range(len(queries))]


def _evaluate_together(
    queries: Sequence[Query], x: Tensor, level: Level, micro_batch: int
) -> list[Prediction]:
    """The predictions of one network under several conditions, from one forward."""
    count, denoiser = len(queries), queries[0].denoiser
    if count == 1:
        return [_evaluate(denoiser, x, level, queries[0].condition, micro_batch)]
    condition = concatenate_conditions(queries, x)
    if isinstance(level.logsnr, Tensor):  # else all samples share it
        level = select_rows(level, torch.arange(len(x)).repeat(count), len(x))
    together = _evaluate(denoiser, torch.cat([x] * count), level, condition, micro_batch)
    return split_prediction(together, count)


def split_prediction(together: Prediction, count: int) -> list[Prediction]:
    """Split the prediction of several conditions of the same samples.

    Args:
        together: prediction of count * B rows, condition by condition.
        count: number of conditions.

    Returns:
        The predictions of B rows each.
    """
    x0, eps = (value.chunk(count) for value in together)
    v = [None] * count if together.variance is None else together.variance.chunk(count)
    return [Prediction(*values) for values in zip(x0, eps, v, strict=True)]


def select_rows(level: Level, rows: Tensor | slice, batch: int) -> Level:
    """The levels of some rows of a batch.

    Args:
        level: level of each row, or one that all samples share, which stays as it is.
        rows: the rows.
        batch: number of rows of the batch.

    Returns:
        The levels of the rows.
    """
    if not isinstance(level.logsnr, Tensor) or len(level.logsnr) != batch:
        return level
    logsnr, t, alpha, sigma = (
        value[rows] if isinstance(value, Tensor) else value
        for value in (level.logsnr, level.t, level.alpha, level.sigma)
    )
    end = None if level.end is None else select_rows(level.end, rows, batch)
    return Level(logsnr, t, alpha, sigma, level.schedule, end)


def concatenate_conditions(queries: Sequence[Query], x: Tensor) -> BatchCondition | None:
    """The conditions of all queries in one batch; a missing one becomes the absent value.

    Args:
        queries: queries to one network.
        x: (B, *shape) its input in each of them.

    Returns:
        The condition of all rows, query by query; None for a process without conditions.
    """
    process = queries[0].denoiser.process
    if not process.dropouts:
        return None
    given = (as_conditions(process, query.condition, len(x), x.device) for query in queries)
    return concatenate([part.to(x.device) for part in given if part is not None])


def _evaluate(
    denoiser: DenoiserProtocol,
    x: Tensor,
    level: Level,
    condition: BatchCondition | None,
    micro_batch: int,
) -> Prediction:
    """Evaluate in calls of exactly `micro_batch` samples, the last one padded; 0 is one call."""
    if not micro_batch:
        return denoiser(x, level, condition)
    parts = []
    for index, start in enumerate(range(0, len(x), micro_batch)):
        part(index)
        # The last sample fills the last call: bits then do not depend on the number of samples.
        rows = torch.arange(start, start + micro_batch).clamp(max=len(x) - 1)
        samples = rows.to(x.device)
        labels = None if condition is None else condition[samples]
        parts.append(denoiser(x[samples], select_rows(level, rows, len(x)), labels))
    x0, eps = (torch.cat(values)[: len(x)] for values in zip(*parts, strict=True))
    v = [part.variance for part in parts if part.variance is not None]
    return replace(parts[0], x0=x0, eps=eps, variance=torch.cat(v)[: len(x)] if v else None)
