"""Bits per dimension of data under a network's probability flow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.process import Process
from diffcore.evaluation.likelihood.density import (
    DEFAULT_SOLVER,
    check_points,
    flow_log_density,
)
from diffcore.evaluation.likelihood.dequantisation import (
    DRAW_BITS,
    Dequantisation,
    check_values,
)
from diffcore.evaluation.likelihood.trace import Trace
from diffcore.guidance.reference import Condition
from diffcore.samplers import Sampler

__all__ = ["Likelihood", "bits_per_dimension", "join_likelihoods", "to_bits"]

Result = TypeVar("Result", bound="Likelihood")


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Bits per dimension of samples.

    Args:
        bits: (N,) bits per dimension of each sample, float64.
        evaluations: mean number of network evaluations for each sample, without backward passes.
    """

    bits: Tensor
    evaluations: float

    @property
    def mean(self) -> float:
        """The mean over the samples."""
        return float(self.bits.mean())

    @property
    def spread(self) -> float:
        """The standard deviation over the samples; NaN for one sample."""
        return float(self.bits.std()) if len(self.bits) > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """The spread over √N.

        It contains the variation of the data and of the random numbers, each sample having its own.
        """
        return self.spread / math.sqrt(len(self.bits))


def bits_per_dimension(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    dequantisation: Dequantisation | None = None,
    *,
    draws: int = 1,
    trace: Trace | None = None,
    solver: Sampler = DEFAULT_SOLVER,
    steps: int = 1,
    condition: Condition = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Likelihood:
    """-log2 P(x_0) / D of each sample under the probability flow of a network.

    With a dequantisation it is an upper bound in expectation, at least 0 for the exact density; see
    `diffcore.evaluation.likelihood.dequantisation`. Without one it is that of the density of the
    data, which depends on their unit and may be negative.

    One draw uses the entropy of the noise in closed form. Several draws are importance weighted.
    With `Hutchinson` the weights contain the noise of its trace, and their mean is biased towards
    fewer bits: use `ExactTrace` or more probes with several draws.

    Song et al. 2020 (2011.13456, appendix D.2); Zheng et al. 2023 (2305.03935, section 4).

    Args:
        denoiser: network with its process, or an exact denoiser.
        x0: (N, *shape) clean data in the range of the process.
        dequantisation: noise on quantised data, with their number of values; None: the data are
            continuous.
        draws: number K of draws of the noise for each sample, with as many integrations.
        trace: how the divergence is computed; None: exact up to 64 elements, else `Hutchinson()`.
        solver: deterministic sampler that integrates the flow.
        steps: number of steps of a solver that is not adaptive; 1 is best for an adaptive one.
        condition: N labels, a table of values by name, or None, as of `sample`.
        seed: 64-bit seed of the noise and of the random vectors.
        first: position of the first sample, below 2^32. The noise of a sample is a function of the
            seed and its position, so that parts of a data set can be measured apart.
        batch_size: number of samples that are integrated together.
        progress: True shows a progress bar.

    Returns:
        The bits of each sample and the number of evaluations.

    Raises:
        ValueError: the arguments do not fit together, or the data has other values than the
            dequantisation names.

    Example:
        >>> from diffcore.core.oracle import GaussianMixture
        >>> oracle = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None])
        >>> result = bits_per_dimension(oracle, torch.zeros(3, 2))
        >>> round(result.mean, 3)  # log2(2π) / 2
        1.326
    """
    process = denoiser.process
    _check(process, x0, dequantisation, draws)
    level = dequantisation.level(process) if dequantisation else None
    evaluations, log_weights = 0.0, []
    for draw in range(draws):
        y, log_q = _dequantise(process, x0, dequantisation, (seed, first), draw, draws)
        found = flow_log_density(
            denoiser,
            y,
            level,
            trace=trace,
            solver=solver,
            steps=steps,
            condition=condition,
            seed=seed,
            offset=first + (draw << DRAW_BITS),
            batch_size=batch_size,
            progress=progress,
        )
        log_weights.append(found.log_density - log_q)
        evaluations += found.evaluations
    log_probability = torch.stack(log_weights).logsumexp(0) - math.log(draws)
    return Likelihood(to_bits(process, log_probability), evaluations)


def to_bits(process: Process, log_probability: Tensor) -> Tensor:
    """Bits per dimension, -ln P / (D ln 2).

    Args:
        process: process with the shape of one sample of D elements.
        log_probability: ln P in nats, of any shape.
    """
    return -log_probability / (math.prod(process.shape) * math.log(2))


def join_likelihoods(parts: Sequence[Result]) -> Result:
    """The likelihood of the samples of several parts of a data set.

    Args:
        parts: likelihoods of one class, in the order of their samples; at least one.

    Returns:
        One likelihood of this class, whose evaluations are the mean over the samples.
    """
    counts = [len(part.bits) for part in parts]
    total = sum(count * part.evaluations for count, part in zip(counts, parts, strict=True))
    names = [each.name for each in fields(parts[0]) if each.name != "evaluations"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], evaluations=total / sum(counts), **joined)


def _dequantise(
    process: Process,
    x0: Tensor,
    dequantisation: Dequantisation | None,
    key: tuple[int, int],
    draw: int,
    draws: int,
) -> tuple[Tensor, Tensor | float]:
    """y (N, *shape) and ln q(y), keyed by the seed and the position of the first sample; for a
    single draw the expectation of ln q, -H.
    """
    if dequantisation is None:
        return x0, 0.0
    seed, first = key
    y, log_q = dequantisation.draw(process, x0, seed, first + torch.arange(len(x0)), draw)
    if draws > 1:
        return y, log_q
    return y, -math.prod(process.shape) * dequantisation.entropy(process)


def _check(process: Process, x0: Tensor, dequantisation: Dequantisation | None, draws: int) -> None:
    check_points(process, x0)
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1 draw of the noise")
    if dequantisation is not None:
        check_values(process, x0, dequantisation.bins)
    elif draws > 1:
        raise ValueError(
            f"draws is {draws}, but without dequantisation there is no noise to draw: name a "
            "dequantisation, or leave draws out"
        )
