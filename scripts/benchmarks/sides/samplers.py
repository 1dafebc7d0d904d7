"""The samplers of diffcore on its grids, as a side of `benchmarks.accuracy`."""

from collections.abc import Iterator
from functools import partial

from benchmarks.accuracy import LARGEST_SIGMA, START, Combination, Ends, Problem
from diffcore.io.specs import describe_component
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AlphaBlending,
    DPMSolverPP,
    GradientEstimation,
    Heun,
    Sampler,
    UniPC,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    AlignYourSteps,
    BetaSpacing,
    CoordinateGrid,
    Cosine,
    Discrete,
    Karras,
    Level,
    Quadratic,
    Schedule,
    Trailing,
    UniformBlend,
    UniformLogSNR,
    Within,
)

__all__ = ["GRIDS", "SAMPLERS", "diffcore_combinations", "knots_for", "run_sampler"]

SAMPLERS: tuple[Sampler, ...] = (
    DDIM(),
    Heun(),
    AlphaBlending(2),
    GradientEstimation(),
    DPMSolverPP("2S"),
    DPMSolverPP("2M"),
    DPMSolverPP("3M"),
    UniPC(1),
    UniPC(2),
    UniPC(3),
    AdamsBashforth.lms(4),
    AdamsBashforth.ipndm(4),
    AdamsBashforth.deis(3),
    AdamsBashforth.flow(2),
    AdamsBashforth.flow(3),
    AdamsBashforth.flow(4),
    AdamsMoulton(1),
    AdamsMoulton(2),
    AdamsMoulton(3),
    AdamsMoulton(3, every=10),
    AdamsMoulton(2, "velocity", "logsnr"),
    AdamsMoulton(2, "x0", "a"),
    AdamsMoulton(2, "x0", "logsnr"),
)
GRIDS: dict[str, tuple[CoordinateGrid, Schedule]] = {
    "Trailing, Cosine": (Trailing(), Cosine()),
    "Trailing, linear table": (Trailing(), Discrete()),
    "UniformBlend()": (UniformBlend(), Cosine()),
    "UniformBlend(1.25, 0.5)": (UniformBlend(1.25, 0.5), Cosine()),
    "UniformBlend(1.5, 0.37)": (UniformBlend(1.5, 0.37), Cosine()),
    "UniformLogSNR(high=7)": (UniformLogSNR(START, 7.0), Cosine()),
    "Karras()": (Karras(sigma_max=LARGEST_SIGMA), Cosine()),
    "Karras(0.01, rho=4)": (Karras(0.01, LARGEST_SIGMA, 4.0), Cosine()),
    "Quadratic, Cosine": (Quadratic(), Cosine()),
    "BetaSpacing, Cosine": (BetaSpacing(), Cosine()),
    "AlignYourSteps('svd')": (AlignYourSteps("svd"), Cosine()),
}


def knots_for(
    sampler: Sampler, grid: CoordinateGrid, schedule: Schedule, count: int
) -> tuple[Level, ...] | None:
    """Place as many knots from START to clean as so many evaluations allow.

    Args:
        sampler: the sampler.
        grid: rule that places the knots.
        schedule: schedule of the knots.
        count: largest number of evaluations.

    Returns:
        The knots, or None if not even one step is possible.
    """
    grid = grid if isinstance(schedule, Discrete) else Within(grid, low=START)
    for steps in range(count, 0, -1):
        knots = grid.knots(schedule, steps)
        if sampler.evaluations(knots) <= count:
            return knots
    return None


def run_sampler(
    sampler: Sampler, grid: CoordinateGrid, schedule: Schedule, problem: Problem, count: int
) -> Ends | None:
    """Integrate a problem from START to clean in as many steps as so many evaluations allow.

    Args:
        sampler: the sampler.
        grid: rule that places the knots.
        schedule: schedule of the knots.
        problem: exact denoiser and starts.
        count: largest number of evaluations.

    Returns:
        The ends and the number of evaluations, or None if not even one step is possible.
    """
    knots = knots_for(sampler, grid, schedule, count)
    if knots is None:
        return None
    return integrate(problem.oracle, sampler, problem.at(knots[0]), knots, problem.noise)


def diffcore_combinations() -> Iterator[Combination]:
    """All samplers of diffcore on all grids.

    Yields:
        The combinations.
    """
    for sampler in SAMPLERS:
        for name, (grid, schedule) in GRIDS.items():
            run = partial(run_sampler, sampler, grid, schedule)
            yield Combination(describe_component(sampler), name, run)
