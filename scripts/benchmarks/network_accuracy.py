"""Samplers on a trained network with guidance, which is less smooth than any oracle.

error = |x_0' - x_0|, the median over seeds; x_0 is the end of the solved flow from the same seed
"""

import math
from collections.abc import Sequence

from torch import Tensor

from benchmarks.table import markdown_table
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.evaluation.flow.exact_flow import FlowSolution, solve_flow
from diffcore.guidance import CFG
from diffcore.io.specs import describe_component
from diffcore.samplers import DDIM, AdamsBashforth, AdamsMoulton, DPMSolverPP, Sampler, UniPC
from diffcore.sampling.generation import DEFAULT_GRID, sample
from diffcore.schedules import Grid, Trailing

SAMPLERS: tuple[Sampler, ...] = (
    DDIM(),
    DPMSolverPP("2M"),
    UniPC(2),
    *(AdamsBashforth(k) for k in (2, 3, 4)),
    *(AdamsMoulton(k) for k in (1, 2, 3)),
)
GRIDS: tuple[Grid, ...] = (Trailing(), DEFAULT_GRID)
SCALES = (1.0, 1.5, 3.0, 7.5)
STEPS = (5, 8, 15, 25)
FLOW_STEPS = 400


def measure_errors(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    grid: Grid,
    steps: Sequence[int],
    scale: float,
    exact: Tensor,
) -> list[float]:
    """Measure the median error at each number of steps.

    Args:
        denoiser: trained network.
        sampler: sampler to measure.
        grid: rule that places the knots.
        steps: numbers of steps.
        scale: guidance scale w.
        exact: (N, *shape) ends of the guided flow.

    Returns:
        The error for each number of steps.
    """
    samples = [draw_samples(denoiser, sampler, grid, n, scale, len(exact)) for n in steps]
    return [(x - exact).flatten(1).norm(dim=1).median().item() for x in samples]


def solve_guided_flow(denoiser: DenoiserProtocol, scale: float, seeds: int) -> FlowSolution:
    """Solve the guided flow.

    Args:
        denoiser: trained network.
        scale: guidance scale w.
        seeds: number of seeds.

    Returns:
        The ends of the flow, and their error.
    """
    labels = choose_labels(denoiser, seeds)
    return solve_flow(denoiser, range(seeds), labels, CFG(scale), FLOW_STEPS, batch_size=seeds)


def choose_labels(denoiser: DenoiserProtocol, seeds: int) -> list[int]:
    """The labels in turn, one for each seed.

    Args:
        denoiser: trained network.
        seeds: number of seeds.

    Returns:
        The labels.
    """
    return [seed % denoiser.process.classes for seed in range(seeds)]


def draw_samples(
    denoiser: DenoiserProtocol, sampler: Sampler, grid: Grid, steps: int, scale: float, seeds: int
) -> Tensor:
    """Draw one sample for each seed, with the labels in turn.

    Args:
        denoiser: trained network.
        sampler: the sampler.
        grid: rule that places the knots.
        steps: number of steps.
        scale: guidance scale w.
        seeds: number of seeds.

    Returns:
        (seeds, *shape) samples.
    """
    return sample(
        denoiser,
        sampler,
        grid,
        steps,
        seeds=range(seeds),
        condition=choose_labels(denoiser, seeds),
        guidance=CFG(scale),
        batch_size=seeds,
    ).x


def measure_table(
    denoiser: DenoiserProtocol,
    seeds: int = 60,
    scales: Sequence[float] = SCALES,
    steps: Sequence[int] = STEPS,
) -> str:
    """Measure all samplers on all grids.

    Args:
        denoiser: trained network.
        seeds: number of seeds.
        scales: guidance scales w.
        steps: numbers of steps.

    Returns:
        The table as Markdown, with a column for each scale and number of steps, and a line for
        the error of the solved flow.
    """
    flows = {w: solve_guided_flow(denoiser, w, seeds) for w in scales}
    rows = []
    for grid in GRIDS:
        for sampler in SAMPLERS:
            cells = [
                f"{error:.2g}"
                for w in scales
                for error in measure_errors(denoiser, sampler, grid, steps, w, flows[w].x)
            ]
            rows.append([describe_component(sampler), str(grid), *cells])
    header = [f"w = {w:g}, {n} steps" for w in scales for n in steps]
    size = math.prod(denoiser.process.shape)
    errors = ", ".join(
        f"{math.sqrt(size) * flow.error:.2g} (w = {w:g})" for w, flow in flows.items()
    )
    table = markdown_table(["sampler", "grid", *header], rows)
    return f"{table}\n\nError of the solved flow, {FLOW_STEPS} steps: {errors}"
