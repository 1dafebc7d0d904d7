"""Samplers on a trained network under guidance, which no oracle stands for: a network is less smooth, and guidance amplifies.

error = |x_0' - x_0|, the median over seeds; x_0 by order 2 in a over 200 steps from the same seed
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoise
from diffcore.guidance import CFG
from diffcore.samplers import DDIM, AdamsBashforth, AdamsMoulton, DPMSolverPP, Sampler, UniPC
from diffcore.sampling.generation import GRID, sample
from diffcore.schedules import Grid, Trailing

SAMPLERS: tuple[Sampler, ...] = (
    DDIM(),
    DPMSolverPP("2M"),
    UniPC(2),
    *(AdamsBashforth(k) for k in (2, 3, 4)),
    *(AdamsMoulton(k) for k in (1, 2, 3)),
)
GRIDS: tuple[Grid, ...] = (Trailing(), GRID)
SCALES = (1.0, 1.5, 3.0, 7.5)
STEPS = (5, 8, 15, 25)


def errors(
    denoiser: Denoise,
    sampler: Sampler,
    grid: Grid,
    steps: Sequence[int],
    scale: float,
    exact: Tensor,
) -> list[float]:
    """At each number of steps, over the rows of the reference."""
    found = [sampled(denoiser, sampler, grid, n, scale, len(exact)) for n in steps]
    return [(x - exact).flatten(1).norm(dim=1).median().item() for x in found]


def reference(denoiser: Denoise, scale: float, seeds: int, steps: int = 200) -> Tensor:
    """Where the guided flow ends."""
    return sampled(denoiser, AdamsBashforth(2), Trailing(), steps, scale, seeds)


def sampled(
    denoiser: Denoise, sampler: Sampler, grid: Grid, steps: int, scale: float, seeds: int
) -> Tensor:
    """A sample a seed, label after label."""
    labels = (torch.arange(seeds) % denoiser.process.classes).tolist()
    made = sample(
        denoiser,
        sampler,
        grid,
        steps,
        seeds=range(seeds),
        condition=labels,
        guidance=CFG(scale),
        batch_size=seeds,
    )
    return made.x


def table(
    denoiser: Denoise,
    seeds: int = 60,
    scales: Sequence[float] = SCALES,
    steps: Sequence[int] = STEPS,
) -> str:
    """Of every sampler and grid, as Markdown: a column for each scale and number of steps."""
    head = " | ".join(f"w = {w:g}, {n} steps" for w in scales for n in steps)
    lines = [f"| sampler | grid | {head} |", "|---|---|" + "---|" * (len(scales) * len(steps))]
    exact = {w: reference(denoiser, w, seeds) for w in scales}
    for grid in GRIDS:
        for sampler in SAMPLERS:
            cells = [
                f"{e:.2g}"
                for w in scales
                for e in errors(denoiser, sampler, grid, steps, w, exact[w])
            ]
            lines.append(f"| {sampler} | {grid} | {' | '.join(cells)} |")
    return "\n".join(lines)
