"""The closest sampler and grid for a network, its guidance and a number of evaluations.

All combinations are measured on fitted samples, and the knots of the closest are tuned on them,
alone and then together with multistep coefficients. What is kept is decided on held-out samples:
the closest tuned combination if the median of its distances to the flow is below that of the
closest untuned one, and the 90th percentile is at most 1.1 times that of it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from diffcore.evaluation.flow.knot_tuning import KnotProblem, TunedSolver, tune_solver
from diffcore.evaluation.flow.sampler_comparison import place_knots, steps_within
from diffcore.evaluation.flow.solver_coordinates import KnotCoordinates, SolverCoordinates
from diffcore.io.specs import describe_component
from diffcore.samplers import (
    AdamsBashforth,
    AdamsMoulton,
    DPMSolverPP,
    GradientEstimation,
    Sampler,
    TunedMultistep,
    UniPC,
)
from diffcore.sampling.generation import DEFAULT_GRID, check_sampling
from diffcore.schedules import BetaSpacing, Grid, Quadratic, Trailing, Tuned, UniformBlend

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "Candidate",
    "GridTuning",
    "HeldOut",
    "Tuning",
    "describe_candidate",
]

SAMPLERS: tuple[Sampler, ...] = (
    AdamsMoulton(1),
    AdamsMoulton(2),
    AdamsMoulton(3),
    UniPC(2),
    UniPC(3),
    DPMSolverPP("2M"),
    AdamsBashforth.flow(2),
    GradientEstimation(),
)
"""Samplers of one evaluation in each step, which are tried by default."""
GRIDS: tuple[Grid, ...] = (
    DEFAULT_GRID,
    UniformBlend(),
    UniformBlend(1.5, 0.37),
    Trailing(),
    Quadratic(),
    BetaSpacing(),
)
"""Grids that are tried by default, and from which the knots are tuned."""
MEASURED = 5
"""Number of combinations, the closest on the fitted samples, that are measured on held-out ones."""

RESIDUALS = 4
"""Number of elements of the fitted samples for each parameter, at least."""
TAIL = 1.1
"""Bound of the 90th percentile of tuned knots over that of untuned ones, which scatters more than
the median."""


class HeldOut(NamedTuple):
    """Distances of held-out samples to the flow, root mean square per element.

    Args:
        median: median over the samples.
        percentile: 90th percentile.
        largest: largest distance.
    """

    median: float
    percentile: float
    largest: float

    @classmethod
    def of(cls, distances: Tensor) -> "HeldOut":
        """Summarise distances (N,)."""
        median, percentile = distances.median().item(), distances.quantile(0.9).item()
        return cls(median, percentile, distances.max().item())


@dataclass(frozen=True)
class Candidate:
    """A sampler on a grid, and its distances.

    Args:
        sampler: numerical integrator.
        grid: rule that places the knots.
        steps: number of steps.
        fitted: geometric mean of the distances of the fitted samples.
        held_out: distances of the held-out samples; None if they were not measured.
    """

    sampler: Sampler
    grid: Grid
    steps: int
    fitted: float
    held_out: HeldOut | None = None

    @property
    def name(self) -> str:
        """The sampler and the grid as text."""
        return f"{_name_sampler(self.sampler)}, {_name_grid(self.grid)}"


@dataclass(frozen=True)
class Tuning:
    """What was found for one number of evaluations.

    Args:
        evaluations: largest number of evaluations of the guided network.
        untuned: the combination that is closest on held-out samples without tuning.
        tuned: the closest one with tuned knots, or with tuned knots and coefficients.
    """

    evaluations: int
    untuned: Candidate
    tuned: Candidate

    @property
    def is_better(self) -> bool:
        """Whether the tuned one is kept, by the median and the 90th percentile, held out."""
        tuned, untuned = self.tuned.held_out, self.untuned.held_out
        assert tuned is not None
        assert untuned is not None
        return tuned.median < untuned.median and _tail(self.tuned) <= TAIL * _tail(self.untuned)

    @property
    def chosen(self) -> Candidate:
        """The combination that is kept."""
        return self.tuned if self.is_better else self.untuned


@dataclass(frozen=True)
class GridTuning:
    """The search for the closest sampler and grid.

    Args:
        fitted: samples to which knots are fitted.
        held_out: samples on which combinations are judged.
        samplers: samplers to try.
        grids: grids to try.
        starts: number of combinations, of different samplers, that are tuned.
        iterations: number of Levenberg-Marquardt steps that tune the knots of each, and half of
            those that then tune its coefficients too.
        history: largest number of differences of predictions that are added to a step with tuned
            coefficients (`TunedMultistep`), fewer if the fitted samples have less than 4 elements
            for each parameter; 0: only knots are tuned.
    """

    fitted: KnotProblem
    held_out: KnotProblem
    samplers: Sequence[Sampler] = SAMPLERS
    grids: Sequence[Grid] = GRIDS
    starts: int = 2
    iterations: int = 6
    history: int = 3

    def __post_init__(self) -> None:
        if self.history < 0:
            raise ValueError(f"history is {self.history}, expected 0 for knots alone, or more")
        if self.starts < 1 or self.iterations < 1:
            raise ValueError(
                f"starts and iterations are {self.starts} and {self.iterations}, expected at "
                "least 1"
            )
        if not (self.samplers and self.grids):
            raise ValueError("samplers and grids are empty, expected at least one of each")

    def tune(self, evaluations: int, report: Callable[[str], None] = lambda line: None) -> Tuning:
        """Search for one number of evaluations.

        Args:
            evaluations: largest number of evaluations of the guided network.
            report: receives a line before each part of the work.

        Returns:
            The closest combinations with and without tuning, measured on held-out samples.

        Raises:
            ValueError: no sampler can be run with so few evaluations.
        """
        ranked = self._rank(evaluations)
        report(f"{evaluations} evaluations: closest without tuning {_describe(ranked[0])}")
        untuned = [self._measure(candidate) for candidate in ranked[:MEASURED]]
        tuned = []
        for candidate in _of_different_samplers(ranked, self.starts):
            for found in self._tune(candidate, report):
                report(f"{evaluations} evaluations: tuned {_describe(found)}")
                tuned.append(self._measure(found))
        best = _closest(untuned)
        return Tuning(evaluations, best, _closest(_without_tail(tuned, best) or tuned))

    def _rank(self, evaluations: int) -> list[Candidate]:
        """The combinations that can be run, the closest on the fitted samples first."""
        found, reasons = [], []
        for sampler, grid in product(self.samplers, self.grids):
            try:
                steps = self._steps(sampler, grid, evaluations)
            except ValueError as error:
                reasons.append(str(error))
                continue
            distances = self.fitted.distances(sampler, grid, steps)
            found.append(Candidate(sampler, grid, steps, _geometric_mean(distances)))
        if not found:
            raise ValueError(f"no sampler can be tuned to {evaluations} evaluations: {reasons[0]}")
        return sorted(found, key=lambda candidate: candidate.fitted)

    def _steps(self, sampler: Sampler, grid: Grid, evaluations: int) -> int:
        """The largest number of steps; ValueError if it is 1, or the samples approach no flow."""
        problem = self.fitted
        process, guidance = problem.denoiser.process, problem.guidance
        if sampler.is_adaptive:
            raise ValueError(f"{sampler} chooses its number of evaluations itself")
        steps = steps_within(sampler, process, grid, guidance, evaluations)
        if steps < 2:
            raise ValueError(f"{sampler} takes fewer than 2 steps, and has no knot to tune")
        knots = place_knots(process, grid, guidance, steps)
        check_sampling(process, knots, problem.seeds, problem.condition, guidance, 1, sampler)
        if sampler.draws_noise(knots):
            raise ValueError(f"{sampler} is stochastic, and approaches no flow")
        return steps

    def _tune(self, start: Candidate, report: Callable[[str], None]) -> list[Candidate]:
        """The candidate with tuned knots, and with tuned coefficients too."""
        schedule = self.fitted.denoiser.process.schedule
        knots = start.grid.knots(schedule, start.steps)
        places = KnotCoordinates(knots[0], schedule.cleanest.logsnr_range[1])
        alone = SolverCoordinates(start.sampler, places, start.steps)
        found = tune_solver(self.fitted, alone, alone.theta(knots), self.iterations, report)
        tuned = [self._tuned(start, found)]
        rule = describe_component(self.fitted.guidance)
        both = replace(alone, history=self._history(alone), guidance=rule)
        if both.history:
            theta = np.append(found.theta, np.zeros(both.size - alone.size))
            found = tune_solver(self.fitted, both, theta, 2 * self.iterations, report)
            tuned.append(self._tuned(start, found))
        return tuned

    def _history(self, start: SolverCoordinates) -> int:
        """The number of differences in a step that the fitted samples determine."""
        problem = self.fitted
        if problem.guidance.levels(problem.denoiser.process):
            return 0  # which become knots, so that the steps have other numbers
        residuals = problem.ends.numel()
        sizes = (replace(start, history=number).size for number in range(1, self.history + 1))
        return sum(RESIDUALS * size <= residuals for size in sizes)

    def _tuned(self, start: Candidate, found: TunedSolver) -> Candidate:
        """The candidate with what was found."""
        texts = describe_component(start.sampler), describe_component(self.fitted.guidance)
        grid = Tuned(found.grid.logsnrs, start.grid, *texts)
        return replace(start, sampler=found.sampler, grid=grid, fitted=math.exp(found.value))

    def _measure(self, candidate: Candidate) -> Candidate:
        """The candidate with its distances on held-out samples."""
        distances = self.held_out.distances(candidate.sampler, candidate.grid, candidate.steps)
        return replace(candidate, held_out=HeldOut.of(distances))


def _geometric_mean(distances: Tensor) -> float:
    return distances.log().mean().exp().item()


def _of_different_samplers(ranked: Iterable[Candidate], count: int) -> list[Candidate]:
    """The first candidate of each of the first `count` samplers."""
    first: dict[Sampler, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.sampler, candidate)
    return list(first.values())[:count]


def _without_tail(candidates: Iterable[Candidate], untuned: Candidate) -> list[Candidate]:
    """The candidates whose 90th percentile is within the bound of the untuned one."""
    return [candidate for candidate in candidates if _tail(candidate) <= TAIL * _tail(untuned)]


def _tail(candidate: Candidate) -> float:
    assert candidate.held_out is not None
    return candidate.held_out.percentile


def _closest(candidates: Iterable[Candidate]) -> Candidate:
    def median(candidate: Candidate) -> float:
        assert candidate.held_out is not None
        return candidate.held_out.median

    return min(candidates, key=median)


def _name_sampler(sampler: Sampler) -> str:
    """The sampler as text; tuned coefficients by their number."""
    if not isinstance(sampler, TunedMultistep):
        return describe_component(sampler)
    count = sum(map(len, (*sampler.x0, *sampler.eps)))
    return f"{describe_component(sampler.inner)} with {count} tuned coefficients"


def _name_grid(grid: Grid) -> str:
    """The grid as text; tuned knots by their λ."""
    if not isinstance(grid, Tuned):
        return describe_component(grid)
    return f"λ = {', '.join(f'{logsnr:.3g}' for logsnr in grid.logsnrs)}"


def _describe(candidate: Candidate) -> str:
    return f"{candidate.name}: {candidate.fitted:.3g}"


def describe_candidate(candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain data.

    Args:
        candidate: the candidate.

    Returns:
        Its name, and its distances.
    """
    held_out = candidate.held_out
    return {
        "name": candidate.name,
        "fitted": candidate.fitted,
        "held_out": None if held_out is None else held_out._asdict(),
    }
