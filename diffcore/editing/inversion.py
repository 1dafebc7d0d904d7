"""Inversion: from an image to the noise that a first-order sampler makes it from.

Over the same knots reversed, each step F(x_t) = α_s x_0(x_t) + σ_s ε(x_t) is solved for x_t. The network is asked at the
noisier end t of a step, as sampling does, and so never at the clean knot.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import hypot
from diffcore.guidance import CFG, Guidance, Step, find_weaker_networks
from diffcore.sampling.generation import evaluation_mode
from diffcore.sampling.loop import check_guidance, check_levels, guided_prediction
from diffcore.schedules import Level, check_falling


class Inversion(NamedTuple):
    """What `invert` found.

    Args:
        x: at the first knot, (B, *shape).
        residual: (steps, B), the root mean square of F(x_t) - x_s at the last x_t that each step asked about, in the order
            of the knots; the x_t that it went on with is one correction nearer. Its maximum says whether all steps converged.
        evaluations: network evaluations for each sample.
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
    condition: Tensor | None = None,
) -> Inversion:
    """x_t ← x_t + g (x_s - F(x_t)), beginning with x_t = x_s brought to its scale, for each step t -> s, the last one first.

        g = (α_t² c + σ_t²) / (α_s α_t c + σ_s σ_t)        c = sigma_data²

    is 1/F' on Gaussian data of variance c: Newton's step with a slope known beforehand, finite also at α_t = 0 and σ_s = 0. As
    c grows g becomes α_t/α_s, which holds ε and is DDIM inversion (Song et al. 2020, 2010.02502, section 4.3) where
    iterations = 1; as c shrinks it becomes σ_t/σ_s, which holds x_0. More iterations solve the step, whatever g (fixed-point
    inversion; 2312.12540). Where F is steeper than 2/g, near the border of two basins, they would diverge: a row whose residual
    did not fall halves its g for the rest of the step. A residual that stays all the same asks for more iterations or knots.

    A guided step is inverted as it is sampled, a rule with memory as in its first step. A step that maps many x_t to one x_s
    (from pure noise to clean; the clean step of the closed-form denoiser of a data set) has no inverse: its residual stays.

    Args:
        denoiser: a network with its process, or an oracle.
        x0: what the last knot shall give, (B, *shape): the image, where that knot is clean.
        knots: as in sampling, falling in noise.
        iterations: evaluations of each step, at least 1.
        guidance: how the condition is strengthened.
        condition: labels (B,), or nothing.

    Raises:
        ValueError: before the first step, where the network cannot be asked so.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected at least 1 evaluation a step")
    check_falling(knots)
    check_levels(denoiser.process, knots)
    check_guidance(denoiser.process, knots, condition, guidance, None)
    x, residuals, evaluations = x0, [], 0
    with evaluation_mode(denoiser, *find_weaker_networks(guidance)):
        for i, (t, s) in reversed(list(enumerate(pairwise(knots)))):
            step = Step(denoiser.process, t, t, s, i, len(knots) - 1)
            goal, x = x, x * (hypot(t.alpha, t.sigma) / hypot(s.alpha, s.sigma))
            gain = x.new_full(
                (len(x), *[1] * (x.ndim - 1)), _gain(t, s, denoiser.process.sigma_data)
            )
            residual = torch.full_like(gain, math.inf)
            for _ in range(iterations):
                prediction, _, asked = guided_prediction(
                    denoiser, guidance, x, t, condition, None, step
                )
                missing, before = goal - prediction.at(s), residual
                residual = _size(missing)
                gain = torch.where(residual < before, gain, gain / 2)
                x, evaluations = x + gain * missing, evaluations + asked
            residuals.append(residual.flatten())
    return Inversion(x, torch.stack(residuals[::-1]), evaluations)


def _size(x: Tensor) -> Tensor:
    """Root mean square of each row, to broadcast against it."""
    return x.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()


def _gain(t: Level, s: Level, sigma_data: float) -> float:
    """G of `invert`; 0 from pure noise to clean, where F is constant."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (float(level.alpha), float(level.sigma)) for level in (t, s)
    )
    slope = alpha_s * alpha_t * sigma_data**2 + sigma_s * sigma_t
    return (alpha_t**2 * sigma_data**2 + sigma_t**2) / slope if slope else 0.0
