"""Few-step networks beside the network that they are distilled from, on mixtures of Gaussians.

A perceptron is trained by denoising. From its weights, students are trained by each method, some
with the trained network as their teacher and some from the data. Reflow learns the pairs of its
flow, and distribution matching trains a second network. Measured are the energy distance of 4000
samples to exact samples in 1, 2 and 4 steps, beside that of the teacher with DDIM, and for networks
of two times the error of U against the integral of the exact velocity.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table, mean_and_half_range

from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.estimate import Estimate
from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    DistributionMatching,
    KnotIntervals,
    MeanFlow,
    OracleTeacher,
    ScoreIdentity,
    Shortcut,
    ShrinkingIntervals,
    Student,
)
from diffcore.distillation.flow_map import FlowMap
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM
from diffcore.sampling.generation import DEFAULT_GRID, sample
from experiments.students.mixtures import (
    SAMPLES,
    Problem,
    create_problem,
    create_process,
    solve_pairs,
    train,
)
from experiments.study import continue_study, group_rows

SIZES = (2, 64)
"""Numbers of dimensions of the mixtures."""
TEACHER = "denoiser"
WEIGHT = MSE("v_prediction")
KNOTS = KnotIntervals(DEFAULT_GRID, first=8, last=64, weighting=WEIGHT)
STUDENT = Student(4, DEFAULT_GRID)
"""Steps of students that are trained on their own samples."""


class Method(NamedTuple):
    """How a student is trained.

    Args:
        estimate: what its network gives.
        objective: its objective for a teacher (None: the data) and a number of steps.
        is_paired: whether it is trained on pairs of noise and the end of the teacher's flow.
        from_data: whether it is trained from the data too.
    """

    estimate: Estimate
    objective: Callable[[Any, int], Objective]
    is_paired: bool = False
    from_data: bool = False


METHODS = {
    "consistency, knots": Method(
        "consistency",
        lambda teacher, steps: Consistency(
            teacher=teacher, intervals=replace(KNOTS, period=max(1, steps // 4))
        ),
    ),
    "consistency, shrinking": Method(
        "consistency",
        lambda teacher, steps: Consistency(
            teacher=teacher,
            intervals=ShrinkingIntervals(period=max(1, steps // 6), weighting=WEIGHT),
        ),
    ),
    "consistency, continuous": Method(
        "consistency",
        lambda teacher, steps: ContinuousConsistency(teacher=teacher, warmup=steps // 4),
    ),
    "mean flow": Method(
        "mean_velocity",
        lambda teacher, steps: MeanFlow(teacher=teacher, share=0.75),
        from_data=True,
    ),
    "shortcut": Method(
        "mean_velocity", lambda teacher, steps: Shortcut(teacher=teacher, steps=64, target="own")
    ),
    "reflow": Method("posterior_mean", lambda teacher, steps: Objective(), is_paired=True),
    "distribution matching": Method(
        "consistency",
        lambda teacher, steps: DistributionMatching(teacher=teacher, student=STUDENT),
    ),
    "score identity": Method(
        "consistency", lambda teacher, steps: ScoreIdentity(teacher=teacher, student=STUDENT)
    ),
}
"""How the students are trained."""


def distances(denoiser: DenoiserProtocol, problem: Problem, counts: Iterable[int]) -> list[float]:
    """Energy distance to the truth in each number of steps, with the default sampler or DDIM.

    Returns:
        One distance for each count.
    """
    sampler = DDIM() if denoiser.process.estimate == "posterior_mean" else None
    found = []
    for count in counts:
        drawn = sample(
            denoiser, sampler, DEFAULT_GRID, count, seeds=range(SAMPLES), batch_size=SAMPLES
        )
        found.append(energy_distance(drawn.x, problem.truth))
    return found


@torch.no_grad()
def velocity_error(denoiser: Denoiser, problem: Problem) -> float:
    """Root mean square error of U of a network of two times, relative to that of U itself.

    Returns:
        The relative error over 500 points of the flow at random pairs of levels.
    """
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    x0 = problem.truth[:500].double()
    a, r, noise = (
        torch.rand(500, 1, **options),
        torch.rand(500, 1, **options),
        torch.randn(x0.shape, **options),
    )
    schedule, r = denoiser.process.schedule, a * r
    level = replace(schedule.at_blend(a), end=schedule.at_blend(r))
    z = (1 - a) * x0 + a * noise
    exact, found = FlowMap(problem.oracle, "mean_velocity", 32)(z, level), denoiser(z, level)
    u, v = (pair.eps - pair.x0 for pair in (exact, found))
    return float((u - v).norm() / u.norm())


def run_study(
    out: Path, seeds: Iterable[int], steps: int, sizes: Iterable[int] = SIZES
) -> Iterator[str]:
    """Train and measure what a file does not contain yet.

    Args:
        out: file of measurements, one JSON object in each line.
        seeds: seeds of the trainings.
        steps: optimizer steps of each training.
        sizes: numbers of dimensions of the mixtures.

    Yields:
        The lines that are appended to the file.
    """
    networks = [
        (TEACHER, "data"),
        *((name, "teacher") for name in METHODS),
        *((name, "data") for name, method in METHODS.items() if method.from_data),
    ]
    cells = [
        (size, steps, seed, *network) for size in sizes for network in networks for seed in seeds
    ]
    names = ("size", "steps", "seed", "method", "from")
    return continue_study(out, names, cells, measure_cell)


def measure_cell(
    size: int, steps: int, seed: int, method: str, source: str
) -> list[Mapping[str, Any]]:
    """Train one network and measure it.

    Returns:
        One row.
    """
    problem, denoiser = train_teacher(size, steps, seed)
    if method == TEACHER:
        return [{"distance": _table(denoiser, problem, (1, 2, 4, 25))}]
    start = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    chosen = METHODS[method]
    objective = chosen.objective(OracleTeacher(denoiser) if source == "teacher" else None, steps)
    process = replace(denoiser.process, estimate=chosen.estimate)
    data = solve_pairs(denoiser, problem) if chosen.is_paired else problem
    student = train(data, process, objective, seed, steps, start)
    row: dict[str, Any] = {"distance": _table(student, problem, (1, 2, 4))}
    if process.estimate == "mean_velocity":
        row["error of U"] = velocity_error(student, problem)
    return [row]


@lru_cache(maxsize=4)
def train_teacher(size: int, steps: int, seed: int) -> tuple[Problem, Denoiser]:
    """A problem, and the denoiser of a seed that is trained on it.

    Returns:
        Both; equal arguments give the same network.
    """
    problem = create_problem(size)
    return problem, train(problem, create_process(size), Objective(), seed, steps, None)


def _table(denoiser: DenoiserProtocol, problem: Problem, counts: tuple[int, ...]) -> Any:
    """Number of steps -> energy distance."""
    return dict(zip(counts, distances(denoiser, problem, counts), strict=True))


def format_table(rows: Iterable[Mapping[str, Any]], size: int) -> str:
    """The table of one size: 1000 times the energy distance, mean ± half range over seeds.

    Returns:
        A Markdown table.
    """
    chosen = [row for row in rows if row["size"] == size]
    table = []
    for (method, source), group in group_rows(chosen, "method", "from").items():
        cells = []
        for count in ("1", "2", "4", "25"):
            values = [1000 * row["distance"][count] for row in group if count in row["distance"]]
            cells.append(mean_and_half_range(values, 2) if values else "")
        errors = [row["error of U"] for row in group if "error of U" in row]
        table.append([method, source, *cells, mean_and_half_range(errors, 3) if errors else ""])
    header = ["network", "trained on", "1 step", "2", "4", "25", "error of U"]
    return markdown_table(header, table)
