"""Samplers at equal numbers of evaluations: their distance to the flow of a network, and time."""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.process import Process
from diffcore.evaluation.flow.exact_flow import FlowSolution, rms_distance, solve_flow
from diffcore.evaluation.flow.order_statistics import median_interval
from diffcore.guidance import Guidance
from diffcore.guidance.reference import Condition
from diffcore.io.specs import describe_component
from diffcore.samplers import Sampler
from diffcore.sampling.generation import DEFAULT_GRID, NonFiniteWarning, check_sampling, sample
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Grid, Level

__all__ = ["Case", "Distance", "SamplerComparison", "place_knots", "steps_within"]

FEWEST = 6
"""Smallest number of samples whose median has an interval."""


class Distance(NamedTuple):
    """Distances of samples to the flow, root mean square per element.

    Args:
        median: median over the samples.
        low: lower end of the interval that covers the median with at least 95 %; None for fewer
            than 6 samples.
        high: upper end of the interval; None for fewer than 6 samples.
        is_resolved: whether the median exceeds the error of the solved flow.
    """

    median: float
    low: float | None
    high: float | None
    is_resolved: bool


@dataclass
class Case:
    """One sampler with one guidance rule and number of evaluations, and what was measured of it.

    Args:
        sampler: numerical integrator.
        guidance: guidance rule.
        count: largest number of evaluations of the guided network.
        steps: number of steps, the most that `count` evaluations allow; 0: not even one.
        reason: why the case has no distance or cannot be run; "": it has one.
        evaluations: evaluations of the network for each sample, those of guidance included.
        ends: first and last level; None if the case cannot be run.
        flow: solved flow between the ends, None without one.
        distance: distance to the flow, None without one.
        x: (N, *shape) samples; None if the case cannot be run.
        seconds: seconds for all samples in each pass.
    """

    sampler: Sampler
    guidance: Guidance
    count: int
    steps: int = 0
    reason: str = ""
    evaluations: float = 0.0
    ends: tuple[Level, Level] | None = None
    flow: FlowSolution | None = None
    distance: Distance | None = None
    x: Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_sample(self) -> float | None:
        """The median of the passes, divided by the number of samples; None if it was not run."""
        return None if self.x is None else median(self.seconds) / len(self.x)


@dataclass(frozen=True)
class SamplerComparison:
    """Samplers x numbers of evaluations x guidance rules on one network, from the same noise.

    Args:
        denoiser: network with its process, or an exact denoiser.
        seeds: N integers, the seeds of the samples of each case.
        samplers: samplers of a fixed number of evaluations.
        counts: largest numbers of evaluations of the guided network. A sampler takes the most steps
            that they allow: one with two evaluations in each step takes half as many.
        guidances: guidance rules.
        condition: condition of the samples, as in `sample`.
        grid: rule that places the knots.
        batch_size: number of samples that are integrated together.
        micro_batch: number of samples in each call of the network; 0: `batch_size`.
        repeats: number of timed passes over all cases, which alternate; the samples are those of
            the first.
        flow_steps: number of steps of the solved flow.
    """

    denoiser: DenoiserProtocol
    seeds: Sequence[int]
    samplers: Sequence[Sampler]
    counts: Sequence[int]
    guidances: Sequence[Guidance]
    condition: Condition = None
    grid: Grid = DEFAULT_GRID
    batch_size: int = 64
    micro_batch: int = 0
    repeats: int = 3
    flow_steps: int = 200

    def __post_init__(self) -> None:
        for sampler in self.samplers:
            if sampler.is_adaptive:
                raise ValueError(
                    f"{sampler} chooses its number of evaluations itself: compare samplers with a "
                    "fixed number of steps"
                )
        if not (self.samplers and self.counts and self.guidances):
            raise ValueError("samplers, counts and guidances are empty, expected one of each")
        if min(self.counts) < 1 or self.repeats < 1:
            raise ValueError(
                f"counts are {list(self.counts)} and repeats {self.repeats}, expected at least 1"
            )

    def run(self, report: Callable[[str], None] = lambda line: None) -> list[Case]:
        """Solve the flows, draw the samples of all cases, and measure.

        Args:
            report: receives a line before each part of the work.

        Returns:
            The cases, by guidance, sampler and count.

        Raises:
            ValueError: no case can be run.
        """
        groups = [
            [self._plan(sampler, guidance, n) for sampler in self.samplers for n in self.counts]
            for guidance in self.guidances
        ]
        cases = [case for group in groups for case in group]
        possible = [case for case in cases if case.steps]
        if not possible:
            raise ValueError(f"no sampler can be run: {cases[0].reason}")
        for group in groups:
            self._solve(group, report)
        for number in range(self.repeats):
            report(f"pass {number + 1} of {self.repeats}: {len(possible)} sets of samples")
            for case in possible:
                self._draw(case)
        for case in possible:
            _measure(case)
        return cases

    def _plan(self, sampler: Sampler, guidance: Guidance, count: int) -> Case:
        """A case with its knots, and the reason if it cannot be run or has no distance."""
        process = self.denoiser.process
        case = Case(sampler, guidance, count)
        steps = steps_within(sampler, process, self.grid, guidance, count)
        if not steps:
            case.reason = f"one step takes more than {count} evaluations"
            return case
        knots = place_knots(process, self.grid, guidance, steps)
        arguments = (self.seeds, self.condition, guidance, self.batch_size)
        check_sampling(process, knots, *arguments)  # a mistake whatever the sampler
        try:
            check_sampling(process, knots, *arguments, sampler)
        except ValueError as error:
            case.reason = str(error)
            return case
        case.steps, case.ends = steps, (knots[0], knots[-1])
        if guidance.depends_on_steps:
            case.reason = "the rule depends on the steps of the sampler, and defines no flow"
        elif sampler.draws_noise(knots):
            case.reason = "a stochastic sampler, which approaches no flow"
        return case

    def _solve(self, group: Sequence[Case], report: Callable[[str], None]) -> None:
        """Give the cases of one rule their flow, which is solved once for each pair of ends."""
        solved: dict[tuple[float, ...], FlowSolution] = {}
        for case in group:
            if case.reason or case.ends is None:
                continue
            ends = tuple(float(level.logsnr) for level in case.ends)
            if ends not in solved:
                rule = describe_component(case.guidance)
                report(f"flow of {rule}: {self.flow_steps} steps, and half as many")
                solved[ends] = solve_flow(
                    self.denoiser,
                    self.seeds,
                    self.condition,
                    case.guidance,
                    self.flow_steps,
                    case.ends,
                    self.batch_size,
                    self.micro_batch,
                )
            case.flow = solved[ends]

    def _draw(self, case: Case) -> None:
        """Draw the samples of a case, and keep those of the first pass."""
        start = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)  # `_measure` counts them
            samples = sample(
                self.denoiser,
                case.sampler,
                self.grid,
                case.steps,
                seeds=self.seeds,
                condition=self.condition,
                guidance=case.guidance,
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
            )
        case.seconds.append(perf_counter() - start)
        if case.x is None:
            case.x, case.evaluations = samples.x, samples.evaluations


def _measure(case: Case) -> None:
    """The distance of the samples of a case to its flow, if it has one and they are finite."""
    if case.x is None or case.flow is None:
        return
    distances = rms_distance(case.x, case.flow.x)
    bad = int((~distances.isfinite()).sum())
    if bad:
        case.reason = f"{bad} of {len(distances)} samples are not finite"
        return
    values = distances.tolist()
    low, high = median_interval(values) if len(values) >= FEWEST else (None, None)
    middle = median(values)
    case.distance = Distance(middle, low, high, middle > case.flow.error)


def place_knots(process: Process, grid: Grid, guidance: Guidance, steps: int) -> tuple[Level, ...]:
    """The knots between which `sample` steps: those of the grid and those that guidance adds.

    Args:
        process: process of the network.
        grid: rule that places the knots.
        guidance: guidance rule.
        steps: number of steps of the grid.

    Returns:
        The levels.
    """
    return insert_levels(grid.knots(process.schedule, steps), guidance.levels(process))


def steps_within(
    sampler: Sampler, process: Process, grid: Grid, guidance: Guidance, count: int
) -> int:
    """The largest number of steps that a number of evaluations allows.

    Args:
        sampler: numerical integrator.
        process: process of the network.
        grid: rule that places the knots.
        guidance: guidance rule, whose levels are knots too.
        count: largest number of evaluations of the guided network.

    Returns:
        The number of steps of the grid; 0 if even one step needs more evaluations.
    """
    return bisect_right(
        range(1, count + 1),
        count,
        key=lambda steps: sampler.evaluations(place_knots(process, grid, guidance, steps)),
    )
