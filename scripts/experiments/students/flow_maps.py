"""Few-step networks beside the network that they are distilled from, on mixtures of Gaussians.

A perceptron is trained by denoising. From its weights, students are trained by each method, some
with the trained network as their teacher and some from the data. Measured are the energy distance
of 4000 samples to exact samples in 1, 2 and 4 steps, beside that of the teacher with DDIM, and for
networks of two times the error of U against the integral of the exact velocity.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.table import markdown_table, mean_and_half_range
from torch import Tensor

from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process, TimeConditioning
from diffcore.distillation import (
    Consistency,
    ContinuousConsistency,
    KnotIntervals,
    MeanFlow,
    OracleTeacher,
    Shortcut,
    ShrinkingIntervals,
)
from diffcore.distillation.few_step import FewStepObjective
from diffcore.distillation.flow_map import FlowMap
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.networks import Perceptron, TwoTimes
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.samplers import DDIM
from diffcore.sampling.generation import DEFAULT_GRID, sample
from diffcore.schedules import Flow
from experiments.study import continue_study, group_rows

SAMPLES, BATCH, WIDTH = 4000, 256, 128
SIZES = (2, 64)
"""Numbers of dimensions of the mixtures."""
TEACHER = "denoiser"
WEIGHT = MSE("v_prediction")
KNOTS = KnotIntervals(DEFAULT_GRID, first=8, last=64, weighting=WEIGHT)
METHODS: dict[str, Callable[[OracleTeacher | None, int], FewStepObjective]] = {
    "consistency, knots": lambda teacher, steps: Consistency(
        teacher=teacher, intervals=replace(KNOTS, period=max(1, steps // 4))
    ),
    "consistency, shrinking": lambda teacher, steps: Consistency(
        teacher=teacher,
        intervals=ShrinkingIntervals(period=max(1, steps // 6), weighting=WEIGHT),
    ),
    "consistency, continuous": lambda teacher, steps: ContinuousConsistency(
        teacher=teacher, warmup=steps // 4
    ),
    "mean flow": lambda teacher, steps: MeanFlow(teacher=teacher, share=0.75),
    "shortcut": lambda teacher, steps: Shortcut(teacher=teacher, steps=64),
}
"""Objective of each method, with a teacher or from the data, for a number of steps."""
FROM_DATA = ("mean flow",)
"""Methods that are trained from the data too."""


class Problem(NamedTuple):
    """A mixture with its exact samples.

    Args:
        oracle: exact denoiser of the mixture.
        data: samples of training.
        truth: samples that are measured against.
    """

    oracle: GaussianMixture
    data: Tensor
    truth: Tensor


def create_problem(size: int) -> Problem:
    """Build a mixture of five Gaussians in `size` dimensions, with its samples.

    Returns:
        The problem; means and covariances are a function of the size.
    """
    generator = torch.Generator().manual_seed(size)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    means = torch.randn(5, size, **options)
    means = 1.5 * means / means.square().mean(1, keepdim=True).sqrt()
    factors = torch.randn(5, size, size, **options) / size**0.5
    covariances = 0.05 * factors @ factors.mT + 0.02 * torch.eye(size, dtype=torch.float64)
    oracle = GaussianMixture(means, covariances, process=create_process(size))
    data, truth = oracle.sample(torch.arange(20_000 + SAMPLES)).float().split((20_000, SAMPLES))
    return Problem(oracle, data, truth)


def create_process(size: int) -> Process:
    """The process of the teacher: the flow, with a time from 0 to 20.

    Returns:
        The process.
    """
    return Process(
        Flow(),
        "flow_prediction",
        TimeConditioning("blend", 20.0),
        shape=(size,),
        low=-math.inf,
        high=math.inf,
        sigma_data=1.0,
    )


def train(
    problem: Problem, process: Process, objective: Objective, seed: int, steps: int, start: Any
) -> Denoiser:
    """Train a perceptron, from the weights of one of one time if given.

    Args:
        problem: the data.
        process: process of the network.
        objective: its loss.
        seed: seed of the weights and of the draws.
        steps: optimizer steps of batch 256.
        start: state of the network of one time; None: random weights.

    Returns:
        The network with averaged weights, in evaluation mode.
    """
    torch.manual_seed(seed)
    inner = Perceptron(process.shape, WIDTH, 4)
    if start is not None:
        inner.load_state_dict(start)
    network = TwoTimes(lambda: inner, scale=10.0) if process.estimate == "mean_velocity" else inner
    denoiser = Denoiser(network, process).train()
    objective.check(process)
    networks = objective.networks(denoiser, torch.device("cpu"), lambda module: module)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    average = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps) ** 0.5
        train_step(denoiser, problem, objective, networks, optimizer, seed, step)
        for name, value in network.state_dict().items():
            average[name].lerp_(value, max(0.005, 1 / (step + 1)))
    network.load_state_dict(average)
    return denoiser.eval()


def train_step(
    denoiser: Denoiser,
    problem: Problem,
    objective: Objective,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> None:
    """Take one step of training.

    Args:
        denoiser: network that is trained.
        problem: the data.
        objective: the loss.
        networks: networks of the objective.
        optimizer: optimizer of the network.
        seed: seed of the draws.
        step: number of the step.
    """
    rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(problem.data)
    key = SampleKey(seed, step, torch.arange(BATCH), BATCH)
    draw = objective.draw(denoiser.process, key)
    loss = objective(denoiser, problem.data[rows], None, draw, networks=networks).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    optimizer.step()


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
        *((name, "data") for name in FROM_DATA),
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
    objective = METHODS[method](OracleTeacher(denoiser) if source == "teacher" else None, steps)
    process = replace(denoiser.process, estimate=objective.ESTIMATE)
    student = train(problem, process, objective, seed, steps, start)
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
