"""Inversion: from an image to the noise from which a first-order sampler generates it.

Over the reversed knots, each step F(x_t) = α_s x_0(x_t) + σ_s ε(x_t) = x_s is solved for x_t. The
network is evaluated at the noisier level t of a step, as in sampling, and never at the clean knot.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import hypot
from diffcore.guidance import CFG, Guidance, Step, find_networks
from diffcore.sampling.generation import evaluation_mode
from diffcore.sampling.loop import check_guidance, check_levels, guided_prediction
from diffcore.schedules import Level, check_falling

__all__ = ["Inversion", "invert"]


class Inversion(NamedTuple):
    """The result of `invert`.

    Args:
        x: (B, *shape) noisy samples at the first knot.
        residual: (steps, B) root mean square of F(x_t) - x_s at the last evaluation of each step,
            in the order of the knots, before the last correction of x_t. Its maximum shows whether
            all steps converged.
        evaluations: number of network evaluations for each sample.
    """

    x: Tensor
    residual: Tensor
    evaluations: int


@torch.no_grad()
def invert(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    knots: tuple[Level, ...],
    iterations: int = 1,
    guidance: Guidance = CFG(1.0),
    condition: BatchCondition | None = None,
) -> Inversion:
    """Invert the steps t -> s, the last one first, by iterating x_t ← x_t + g (x_s - F(x_t)).

        g = (α_t² c + σ_t²) / (α_s α_t c + σ_s σ_t)        c = sigma_data²

    The iteration starts from x_t = x_s in the scale of t. g is 1/F' on Gaussian data of variance c,
    so this is Newton's step with a known slope, finite also at α_t = 0 and σ_s = 0. For large c,
    g is α_t/α_s, which keeps ε and with one iteration is DDIM inversion (Song et al. 2020,
    2010.02502, section 4.3); for small c, it is σ_t/σ_s, which keeps x_0. More iterations solve the
    step for every g (fixed-point inversion; 2312.12540). They would diverge where F is steeper than
    2/g, near the border of two basins, so a sample whose residual did not decrease halves its g for
    the rest of the step. If a residual stays large, use more iterations or knots.

    A guided step is inverted with the same guidance; a rule with memory acts as in its first step.
    A step that maps many x_t to one x_s (from pure noise to clean; the clean step of the
    closed-form denoiser of a data set) has no inverse, and its residual stays large.

    Args:
        denoiser: network with its process, or an exact denoiser.
        x0: (B, *shape) samples at the last knot; images if that knot is clean.
        knots: levels of sampling, each less noisy than the one before.
        iterations: number of evaluations of each step, at least 1.
        guidance: guidance rule.
        condition: (B,) labels or `Conditions`, or None.

    Returns:
        The noisy samples and the residual of each step.

    Raises:
        ValueError: The arguments do not fit together; raised before the first step.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1 evaluation per step")
    check_falling(knots)
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, None)
    x, residuals, evaluations = x0, [], 0
    with evaluation_mode(denoiser, *find_networks(guidance)):
        for i, (t, s) in reversed(list(enumerate(pairwise(knots)))):
            step = Step(denoiser.process, t, t, s, i, len(knots) - 1)
            end, x = x, x * (hypot(t.alpha, t.sigma) / hypot(s.alpha, s.sigma))
            gain = _initial_gain(x, t, s, denoiser.process.sigma_data)
            residual = torch.full_like(gain, math.inf)
            for _ in range(iterations):
                prediction, _, count = guided_prediction(
                    denoiser, guidance, x, t, condition, None, step
                )
                error, before = end - prediction.at(s), residual
                residual = _root_mean_square(error)
                gain = torch.where(residual < before, gain, gain / 2)
                x, evaluations = x + gain * error, evaluations + count
            residuals.append(residual.flatten())
    return Inversion(x, torch.stack(residuals[::-1]), evaluations)


def _root_mean_square(x: Tensor) -> Tensor:
    """Root mean square of each sample, in a shape that broadcasts against x."""
    return x.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()


def _initial_gain(x: Tensor, t: Level, s: Level, sigma_data: float) -> Tensor:
    """g of `invert` before it is halved; 0 from pure noise to clean, where F is constant.

    Args:
        x: samples, (B, *shape).
        t: level at the beginning of the step.
        s: level at its end.
        sigma_data: standard deviation of the data, √c.

    Returns:
        One number for each sample, in a shape that broadcasts against x.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (float(level.alpha), float(level.sigma)) for level in (t, s)
    )
    slope = alpha_s * alpha_t * sigma_data**2 + sigma_s * sigma_t
    gain = (alpha_t**2 * sigma_data**2 + sigma_t**2) / slope if slope else 0.0
    return x.new_full((len(x), *[1] * (x.ndim - 1)), gain)
