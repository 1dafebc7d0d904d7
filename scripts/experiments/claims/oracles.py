"""Distances of DDIM, α-blending and gradient estimation to the exact flow of two mixtures.

The problems are those of `benchmarks.accuracy`. Three groups of starts show the spread.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy import Problem, plane, spectra
from benchmarks.sides.samplers import run_sampler
from torch import Tensor

from diffcore.samplers import DDIM, AlphaBlending, GradientEstimation, Sampler
from diffcore.schedules import CoordinateGrid, Cosine, Discrete, Schedule, Trailing, UniformBlend
from experiments.study import continue_study

__all__ = ["METHODS", "measure", "run_study"]

EVALUATIONS = (5, 8, 10, 20)
STARTS = 40
"""Starts of each group."""


class Method(NamedTuple):
    """A sampler on its knots."""

    sampler: Sampler
    grid: CoordinateGrid
    schedule: Schedule


METHODS = {
    "DDIM, linear table": Method(DDIM(), Trailing(), Discrete()),
    "DDIM, cosine": Method(DDIM(), Trailing(), Cosine()),
    "AlphaBlending(1)": Method(AlphaBlending(1), UniformBlend(), Cosine()),
    "AlphaBlending(2)": Method(AlphaBlending(2), UniformBlend(), Cosine()),
    "GradientEstimation, linear table": Method(GradientEstimation(), Trailing(), Discrete()),
    "GradientEstimation, cosine": Method(GradientEstimation(), Trailing(), Cosine()),
}
ORACLES = {"2-D": plane, "64-D": spectra}


def run_study(out: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Measure all problems that a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: numbers of the groups of starts, which are measured together.

    Yields:
        The lines that are appended to the file.
    """
    groups = sorted(seeds)
    return continue_study(
        out, ("problem",), [(name,) for name in ORACLES], lambda name: measure(name, groups)
    )


def measure(name: str, groups: list[int], starts: int = STARTS) -> Iterator[dict[str, Any]]:
    """Measure all methods on a problem.

    Args:
        name: name of the problem.
        groups: numbers of the groups of starts.
        starts: starts of each group.

    Yields:
        For each method and group: errors, the median distance to the ends of the exact flow, by the
        largest number of evaluations.
    """
    problem = Problem(ORACLES[name](), starts * (max(groups) + 1))
    errors = {method: _distances(problem, METHODS[method]) for method in METHODS}
    for group in groups:
        rows = slice(group * starts, (group + 1) * starts)
        for method, by_count in errors.items():
            medians = {str(count): float(d[rows].median()) for count, d in by_count.items()}
            yield {"method": method, "seed": group, "errors": medians}


def _distances(problem: Problem, method: Method) -> dict[int, Tensor]:
    """(N,) distances to the ends of the exact flow, by the largest number of evaluations."""
    found = {}
    for count in EVALUATIONS:
        ends = run_sampler(*method, problem, count)
        assert ends is not None
        found[count] = problem.distances(ends[0])
    return found
