"""The density of a network's probability flow, by integration of its divergence.

In z = x/(α+σ) and a = σ/(α+σ) the flow is dz/da = v = ε - x_0. Along it, its density p changes as

    d ln p(z)/da = -tr ∂v/∂z

The integral c of the trace is one more coordinate of the state that a sampler integrates, from the
cleanest level to pure noise, so that every deterministic sampler is a solver. In x, the density of
y = x/α at the first level, which is data with noise of σ/α, is

    ln p(y) = ln N(x_1; 0, α_1² s² + σ_1²) + D ln (α_1 + σ_1) + c - D ln (α + σ) + D ln α

where x_1 is the end of the flow, and the normal distribution is the one that `sample` starts from.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.estimate import require_posterior_mean
from diffcore.core.gaussian import gaussian_log_density
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction, edm_norm
from diffcore.core.process import Process
from diffcore.evaluation.likelihood.trace import Trace, default_trace
from diffcore.guidance import CFG
from diffcore.guidance.reference import Condition
from diffcore.samplers import AdaptiveRungeKutta, Sampler
from diffcore.sampling.generation import check_sampling, evaluation_mode, padded_chunks
from diffcore.sampling.loop import integrate
from diffcore.schedules import Level, UniformBlend, Within

__all__ = [
    "DEFAULT_SOLVER",
    "FIRST_LOGSNR",
    "FlowDensity",
    "check_points",
    "first_level",
    "flow_log_density",
]

DEFAULT_SOLVER: Sampler = AdaptiveRungeKutta(rtol=1e-5, atol=1e-5)
"""Dormand and Prince's method with the tolerances that Song et al. 2020 (2011.13456) use."""
FIRST_LOGSNR = 2 * math.log(1000)
"""λ of the first level by default: σ/α = 0.001, an eighth of the step of 8-bit images."""
LAST_LOGSNR = -2 * math.log(1e5)
"""λ of the last level of schedules that end at more noise; α/σ = 1e-5 of the data remains."""


class FlowDensity(NamedTuple):
    """The density of samples under a probability flow.

    Args:
        log_density: (N,) ln p of each sample in nats, float64.
        latent: (N, *shape) x at the noisy end of the flow.
        evaluations: mean number of network evaluations for each sample, without backward passes.
    """

    log_density: Tensor
    latent: Tensor
    evaluations: float


def first_level(process: Process, logsnr: float = FIRST_LOGSNR) -> Level:
    """The level at which the flow begins: λ, or the cleanest level of training if that is noisier.

    Args:
        process: process of the network.
        logsnr: λ, finite.

    Returns:
        The level of the process's schedule.
    """
    return process.schedule.at(min(logsnr, process.schedule.cleanest.logsnr_range[1]))


def flow_log_density(
    denoiser: DenoiserProtocol,
    y: Tensor,
    level: Level | None = None,
    *,
    trace: Trace | None = None,
    solver: Sampler = DEFAULT_SOLVER,
    steps: int = 1,
    condition: Condition = None,
    seed: int = 0,
    offset: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> FlowDensity:
    """ln p(y) of y = x/α at a level of the flow, in nats.

    At a level with σ > 0, p is the density of data to which noise of the standard deviation σ/α is
    added. It is a density over the space of the data and tends to that of the data as σ/α falls.

    Args:
        denoiser: network with its process, or an exact denoiser.
        y: (N, *shape) points in the space of x_0.
        level: level of y; None: σ/α = 0.001, or the cleanest level of training.
        trace: how the divergence is computed; None: exact up to 64 elements, else `Hutchinson()`.
        solver: deterministic sampler that integrates the flow.
        steps: number of steps of a solver that is not adaptive, on knots uniform in a; 1 is best
            for an adaptive one.
        condition: N labels, a table of values by name, or None, as of `sample`.
        seed: 64-bit seed of the random vectors of the trace.
        offset: position of the first sample; the random vectors of a sample are a function of the
            seed and its position.
        batch_size: number of samples that are integrated together. Another one changes the values
            within the tolerance of an adaptive solver.
        progress: True shows a progress bar.

    Returns:
        The densities in nats, the ends of the flow, and the number of evaluations.

    Raises:
        ValueError: the arguments do not fit together, the solver adds noise or does not meet its
            tolerance, or the levels of the elements are learned.
    """
    process, start = denoiser.process, level or first_level(denoiser.process)
    require_posterior_mean(process, "the likelihood of a flow")
    check_points(process, y)
    if process.levels == "learned":
        raise ValueError(
            "the density of the flow needs one level for all elements, and the levels of the "
            "process are learned, one for each: use variational_bound, or --method bound"
        )
    knots = _knots(process, start, steps)
    if not solver.is_adaptive and solver.draws_noise(knots[::-1]):
        raise ValueError(
            f"{solver} adds noise, and the density of a flow needs a deterministic solver: use "
            "AdaptiveRungeKutta, or another sampler without noise"
        )
    given = check_sampling(process, knots, range(len(y)), condition, CFG(1.0), batch_size, solver)
    trace = trace or default_trace(math.prod(process.shape))
    device = denoiser.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values, latents, evaluations = [], [], 0
    bar = tqdm(total=len(y), unit="sample", disable=not progress)
    with torch.no_grad(), evaluation_mode(denoiser), bar:
        for rows, real in padded_chunks(len(y), batch_size):
            vectors = trace.vectors(math.prod(process.shape), seed, rows + offset)
            flow = _FlowWithDivergence(denoiser, trace, vectors.to(device, dtype))
            x = start.alpha * y[rows].to(device, dtype).flatten(1)
            state = torch.cat([x, x.new_zeros(len(x), 1)], 1)
            noise = Noise(rows, process.shape, device, dtype)
            chosen = None if given is None else given[rows].to(device)
            state, count = integrate(flow, solver, state, knots, noise, CFG(1.0), chosen)
            values.append(_log_density(process, state, start, knots[-1])[:real].double().cpu())
            latents.append(state[:real, :-1].unflatten(1, process.shape).cpu())
            evaluations += count * real
            bar.update(real)
    return FlowDensity(torch.cat(values), torch.cat(latents), evaluations / len(y))


class _FlowWithDivergence(DenoiserWrapper):
    """A denoiser of flat x with a further element (α+σ) c, where dc/da is the divergence.

    Args:
        inner: the denoiser.
        trace: how the divergence is computed.
        vectors: its vectors.
    """

    def __init__(self, inner: DenoiserProtocol, trace: Trace, vectors: Tensor) -> None:
        super().__init__(inner)
        self.trace, self.vectors = trace, vectors

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        points, total = x[:, :-1], x[:, -1:]
        norm = float(level.alpha + level.sigma)
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            shaped = points.unflatten(1, self.process.shape)
            prediction = self.inner(shaped, level, condition)
            x0, eps = prediction.x0.flatten(1), prediction.eps.flatten(1)
            divergence = norm * self.trace.estimate(eps - x0, points, self.vectors)[:, None]
        # The pair whose ε - x_0 is the divergence, and whose α x_0 + σ ε is the element itself.
        c = total / norm
        own = c - level.sigma / norm * divergence, c + level.alpha / norm * divergence
        return Prediction(torch.cat([x0.detach(), own[0]], 1), torch.cat([eps.detach(), own[1]], 1))


def _knots(process: Process, start: Level, steps: int) -> tuple[Level, ...]:
    """Levels from the first one to pure noise, uniform in a."""
    last = max(LAST_LOGSNR, float(process.schedule.logsnr(1.0)))
    grid = Within(UniformBlend(), last, float(start.logsnr))
    return grid.knots(process.schedule, steps)[::-1]


def _log_density(process: Process, state: Tensor, first: Level, last: Level) -> Tensor:
    """ln p(y) from the state at the end of the flow."""
    x, size = state[:, :-1], state.shape[1] - 1
    scale, norm = (float(value) for value in (_prior_std(process, last), last.alpha + last.sigma))
    log_prior = gaussian_log_density(x, x.new_zeros(()), x.new_tensor(2 * math.log(scale)))
    jacobian = math.log(norm) + math.log(first.alpha / (first.alpha + first.sigma))
    return log_prior.sum(1) + size * jacobian + state[:, -1] / norm


def _prior_std(process: Process, level: Level) -> float:
    """Standard deviation of the first x of sampling, √(α² s² + σ²)."""
    return float(edm_norm(level, process.sigma_data))


def check_points(process: Process, y: Tensor) -> None:
    """Check the shape of data.

    Args:
        process: process with the shape of one sample.
        y: (N, *shape) data, at least one sample.

    Raises:
        ValueError: there are no samples, or they have another shape.
    """
    if not len(y) or tuple(y.shape[1:]) != process.shape:
        raise ValueError(
            f"the data has shape {tuple(y.shape)}, expected at least one sample of the process's "
            f"shape {process.shape}, stacked along the first axis"
        )
