"""Requests for samples, and the checks before one of them is accepted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from diffcore.core.conditions import BatchCondition
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance
from diffcore.guidance.reference import Condition
from diffcore.samplers import Sampler
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, check_sampling
from diffcore.sampling.loop import count_evaluations
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Grid, Level

__all__ = ["QueueFullError", "RequestPlan", "SamplingLimits", "SamplingRequest", "plan_request"]


class QueueFullError(Exception):
    """The service has as many unfinished samples as it accepts: send the request again later."""


@dataclass(frozen=True, eq=False)
class SamplingRequest:
    """A request for one sample per seed; the arguments are those of `diffcore.sample`.

    Args:
        seeds: N integers of 64 bits, one for each sample.
        condition: N class labels, or values by the name of the condition; None: unconditional.
        sampler: numerical integrator.
        grid: rule that places the knots.
        steps: number of steps.
        guidance: guidance rule; CFG(1) is the conditional model.
        path: True draws the noise of stochastic samplers as increments of one Brownian path for
            each seed.
    """

    seeds: Sequence[int] | Tensor
    condition: Condition = None
    sampler: Sampler = DEFAULT_SAMPLER
    grid: Grid = DEFAULT_GRID
    steps: int = 25
    guidance: Guidance = CFG(1.0)
    path: bool = False


@dataclass(frozen=True)
class SamplingLimits:
    """Bounds on requests, beyond which a service refuses them.

    Args:
        samples: maximum number of samples of one request.
        steps: maximum number of sampler steps, and of every integer option of a component, such as
            the repetitions of Restart.
        evaluations: maximum number of network evaluations for each sample, references included. A
            sample of an adaptive sampler that needs more fails.
        queue: maximum number of unfinished samples of all requests; further requests are refused
            until some are done.
    """

    samples: int = 64
    steps: int = 250
    evaluations: int = 1000
    queue: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"the limit of {field.name} is {getattr(self, field.name)}, expected at least 1"
                )


class RequestPlan(NamedTuple):
    """A request that was checked.

    Args:
        request: the request.
        knots: levels between which the sampler steps.
        condition: condition of N samples in the form that the process has, or None.
        planned: number of network evaluations for each sample if no rule stops early; None for an
            adaptive sampler.
    """

    request: SamplingRequest
    knots: tuple[Level, ...]
    condition: BatchCondition | None
    planned: int | None


def plan_request(process: Process, request: SamplingRequest, limits: SamplingLimits) -> RequestPlan:
    """Check a request, before anything is computed for it.

    Args:
        process: process of the network.
        request: the request.
        limits: bounds on the request.

    Returns:
        The plan of the request.

    Raises:
        ValueError: the request exceeds a limit, or its arguments do not fit together; the message
            has the remedy.
    """
    _check_size(request, limits)
    guidance = request.guidance
    knots = request.grid.knots(process.schedule, request.steps)
    knots = insert_levels(knots, guidance.levels(process))
    condition = check_sampling(
        process, knots, request.seeds, request.condition, guidance, 1, request.sampler
    )
    planned = _count_evaluations(process, request, knots, limits)
    return RequestPlan(request, knots, condition, planned)


def _check_size(request: SamplingRequest, limits: SamplingLimits) -> None:
    """Raise ValueError if the numbers of a request are beyond the limits."""
    if not 0 < len(request.seeds) <= limits.samples:
        raise ValueError(
            f"seeds are {len(request.seeds)}, expected 1 to {limits.samples}: send several requests"
        )
    largest = max((request.steps, *_integers((request.sampler, request.grid, request.guidance))))
    if largest > limits.steps:
        raise ValueError(
            f"the request contains the number {largest}, expected steps and integer options of at "
            f"most {limits.steps}"
        )


def _integers(part: Any) -> Iterator[int]:
    """The integers among the options of components."""
    if isinstance(part, int):
        yield part
    elif isinstance(part, (tuple, list)):
        for item in part:
            yield from _integers(item)
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            yield from _integers(getattr(part, field.name, None))


def _count_evaluations(
    process: Process, request: SamplingRequest, knots: tuple[Level, ...], limits: SamplingLimits
) -> int | None:
    """The planned number of evaluations, refused beyond the limit without counting further."""
    sampler, limit = request.sampler, limits.evaluations
    if sampler.is_adaptive:
        return None
    states = islice(sampler.dry_run(knots), limit + 1)
    first = next(states)
    planned = None
    # Each step of Restart builds the tuple of the remaining knots: a long one is not even begun.
    if len(first.remaining) <= limit and sum(1 for _ in states) < limit:
        planned = count_evaluations(process, sampler, knots, request.guidance)
    if planned is None or planned > limit:
        raise ValueError(
            f"{sampler} with {request.steps} steps and {request.guidance} needs more than {limit} "
            "network evaluations for each sample: use fewer steps"
        )
    return planned
