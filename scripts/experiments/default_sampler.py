"""Which sampler and grid are closest to the flow in the median and in the tail, guided or not.

Candidates for the default of `sample` on exact denoisers and networks, guided by CFG or not.
The distance is the root mean square per element to the solved flow from the same noise. A sample is
`far` if its distance exceeds 0.1, which at a standard deviation of the data of about 0.5 is mostly
another mode.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.table import markdown_table

from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.evaluation.flow.exact_flow import solve_flow
from diffcore.evaluation.flow.knot_tuning import KnotProblem
from diffcore.guidance import CFG
from diffcore.io.specs import describe_component
from diffcore.run import Run
from diffcore.samplers import AdamsMoulton, Sampler
from diffcore.schedules import BetaSpacing, Grid, UniformBlend
from experiments.study import continue_study, group_rows
from experiments.tuning import decades, problem_builders, study_cells

FAR, STARTS = 0.1, 256
COUNTS = (5, 6, 8, 10, 15, 20, 25, 30)
CANDIDATES: tuple[tuple[Sampler, Grid], ...] = tuple(
    (AdamsMoulton(3, every=10), grid)
    for grid in (
        UniformBlend(1.25, 0.5),
        UniformBlend(1.25, 0.6),
        UniformBlend(1.25, 0.7),
        UniformBlend(1.2, 0.65),
        UniformBlend(1.1, 0.5),
        UniformBlend(1.1, 0.6),
        UniformBlend(1.1, 0.7),
        UniformBlend(1.0, 0.5),
        BetaSpacing(),
    )
)
"""Samplers on grids; the first is the default."""
SCALES = {"mixture": (1.0,), "64-D": (1.0,), "decades": (1.0,), "classes": (1.0, 3.0, 7.5)}
SCALES |= {
    "digits": (1.0, 3.0, 7.5),
    "points": (1.0, 3.0, 7.5),
    "tiny Stable Diffusion": (1.0, 7.5),
}
NETWORKS = {"digits": 40, "points": STARTS, "tiny Stable Diffusion": 40}
"""Networks, and their number of samples; oracles have more."""


def classes() -> GaussianMixture:
    """Create the mixture `decades` with its components in three classes.

    Returns:
        The exact denoiser.
    """
    mixture = decades()
    covariances = (mixture.axes * mixture.eigenvalues[:, None]) @ mixture.axes.mT
    process = Process(shape=(64,), classes=3, dropout=0.1)
    return GaussianMixture(mixture.means, covariances, None, torch.arange(12) % 3, process)


def run_study(out: Path, run: Path, only: Sequence[str] = ()) -> Iterator[str]:
    """Measure the cells that the file of measurements lacks.

    Args:
        out: file of measurements.
        run: folder of a run of the digits recipe; beside it is the folder `points` of a run of the
            recipe points.
        only: names of problems; none: all.

    Yields:
        The lines that were appended.
    """
    builders = problem_builders(run) | {
        "classes": classes,
        "points": lambda: Run(run.parent / "points").denoiser(),
    }
    cells = study_cells(only or list(SCALES), SCALES, COUNTS)

    @cache
    def problem(name: str, scale: float) -> KnotProblem:
        denoiser, count = builders[name](), NETWORKS.get(name, STARTS)
        number = denoiser.process.classes
        labels = torch.arange(count) % number if number else None
        steps = 120 if name in NETWORKS else 400
        flow = solve_flow(denoiser, range(count), labels, CFG(scale), steps, batch_size=count)
        return KnotProblem(denoiser, CFG(scale), range(count), flow.x, labels, count)

    def measure(name: str, scale: float, count: int) -> Iterable[Mapping[str, Any]]:
        return [
            measure_candidate(problem(name, scale), sampler, grid, count)
            for sampler, grid in CANDIDATES
        ]

    yield from continue_study(out, ("problem", "scale", "evaluations"), cells, measure)


def measure_candidate(
    problem: KnotProblem, sampler: Sampler, grid: Grid, count: int
) -> dict[str, Any]:
    """Measure a sampler on a grid.

    Args:
        problem: samples, and the ends of their flow.
        sampler: numerical integrator of one evaluation in each step.
        grid: rule that places the knots.
        count: number of evaluations.

    Returns:
        Plain data: the name, the median, the 99th percentile and the share of far samples.
    """
    distances = problem.distances(sampler, grid, count)
    return {
        "method": f"{describe_component(sampler)}, {describe_component(grid)}",
        "median": distances.median().item(),
        "tail": distances.quantile(0.99).item(),
        "far": (distances > FAR).double().mean().item(),
    }


def group_problems(
    measurements: Sequence[dict[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """The measurements by what the tables separate.

    Args:
        measurements: measurements of the study.

    Returns:
        Title -> measurements, without empty groups.
    """
    groups = {
        "All": measurements,
        "Fewer than 10 evaluations": [row for row in measurements if row["evaluations"] < 10],
        "20 evaluations or more": [row for row in measurements if row["evaluations"] >= 20],
        "Guided, w above 1": [row for row in measurements if row["scale"] > 1],
    }
    return {title: list(rows) for title, rows in groups.items() if rows}


def format_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    """The candidates, by the geometric mean of their ratios to the best of each row.

    Args:
        measurements: measurements of the study.

    Returns:
        The table as Markdown: geometric mean and maximum of the ratio of the median, the same of
        the 99th percentile, and the mean share of far samples.
    """
    best: dict[Any, dict[str, float]] = {}
    for key, rows in group_rows(measurements, "problem", "scale", "evaluations").items():
        best[key] = {name: min(row[name] for row in rows) for name in ("median", "tail")}
    lines = []
    for method, rows in group_rows(measurements, "method").items():
        keys = [(row["problem"], row["scale"], row["evaluations"]) for row in rows]
        ratios = {
            name: [row[name] / best[key][name] for row, key in zip(rows, keys, strict=True)]
            for name in ("median", "tail")
        }
        means = {name: math.exp(sum(map(math.log, r)) / len(r)) for name, r in ratios.items()}
        far = sum(row["far"] for row in rows) / len(rows)
        numbers = [v for name, r in ratios.items() for v in (means[name], max(r))]
        name = method if isinstance(method, str) else method[0]
        lines.append((means["median"] * means["tail"], [name, *numbers, far]))
    header = ["candidate", "median", "worst", "99th percentile", "worst", "far samples"]
    return markdown_table(
        header,
        [
            [str(cells[0]), *(f"{value:.2f}" for value in cells[1:-1]), f"{cells[-1]:.2%}"]
            for _, cells in sorted(lines, key=lambda line: line[0])
        ],
    )
