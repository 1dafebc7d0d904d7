"""The flow of a network with guidance, solved with many steps, and the distance of samples to it.

    d(x, x*) = √(1/n Σ_i (x_i - x*_i)²),   n the number of elements of a sample

Every sampler of the flow reaches the same x* from the same noise as its steps become small, so d is
its error.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.estimate import require_posterior_mean
from diffcore.guidance import Guidance
from diffcore.guidance.reference import Condition
from diffcore.samplers import AdamsMoulton, Sampler
from diffcore.sampling.generation import NonFiniteWarning, sample
from diffcore.schedules import Level, UniformBlend, Within

__all__ = ["FLOW_SAMPLER", "FlowSolution", "rms_distance", "solve_flow"]

FLOW_SAMPLER: Sampler = AdamsMoulton(1)
"""Sampler of the accurate solution. A network has fine structure in t, on which methods that
extrapolate many values gain nothing.
"""
FLOW_GRID = UniformBlend(1.25, 0.5)


class FlowSolution(NamedTuple):
    """Ends of the flow, and their error.

    Args:
        x: (N, *shape) ends in float64, one for each seed.
        error: median over the samples of the distance between the solution with half as many steps
            and x. The error of x itself is smaller.
        steps: number of steps.
    """

    x: Tensor
    error: float
    steps: int


def solve_flow(
    denoiser: DenoiserProtocol,
    seeds: Sequence[int],
    condition: Condition,
    guidance: Guidance,
    steps: int = 200,
    ends: tuple[Level, Level] | None = None,
    batch_size: int = 64,
    micro_batch: int = 0,
) -> FlowSolution:
    """Solve the flow of a guided denoiser, in float64 around the network.

    Args:
        denoiser: network with its process, or an exact denoiser.
        seeds: N integers, which determine the noise at the first level as in `sample`.
        condition: condition of the samples, as in `sample`.
        guidance: guidance rule.
        steps: number of steps of the solution, at least 2; half as many give its error.
        ends: first and last level; None: pure noise, or the noisiest level of the schedule, and
            clean data.
        batch_size: number of samples that are integrated together.
        micro_batch: number of samples in each call of the network; 0: `batch_size`.

    Returns:
        The solution.

    Raises:
        ValueError: the rule defines no flow, or there are fewer than 2 steps.

    Example:
        solve_flow(Run("runs/digits").denoiser(), range(16), None, CFG(1.0)).x
    """
    if guidance.depends_on_steps:
        raise ValueError(
            f"{guidance} defines no flow, because its prediction depends on the steps of the "
            "sampler: use CFG, or a rule without momentum and first steps"
        )
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2, to halve them")
    require_posterior_mean(denoiser.process, "the exact flow of a network")
    low, high = (-math.inf, math.inf) if ends is None else (float(level.logsnr) for level in ends)
    grid = Within(FLOW_GRID, low, high)
    # mps has no float64.
    dtype = torch.float32 if denoiser.device.type == "mps" else torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        coarse, fine = (
            sample(
                denoiser,
                FLOW_SAMPLER,
                grid,
                count,
                seeds=seeds,
                condition=condition,
                guidance=guidance,
                batch_size=batch_size,
                micro_batch=micro_batch,
                dtype=dtype,
            ).x.double()
            for count in (steps // 2, steps)
        )
    return FlowSolution(fine, rms_distance(coarse, fine).median().item(), steps)


def rms_distance(x: Tensor, other: Tensor) -> Tensor:
    """The root mean square difference per element of each sample.

    Args:
        x: (N, *shape) samples.
        other: (N, *shape) samples to compare with.

    Returns:
        (N,) distances in float64.
    """
    return (x.double() - other.double()).flatten(1).square().mean(1).sqrt()
