"""The variational bound of the discrete model that DDPM's steps sample from.

With knots t_n > ... > t_1 > clean, x_i at t_i, and the steps p(x_s | x_t) = N(μ, V) of `DDPM`,

    -ln P(x_0) ≤ L_T + Σ_i KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + L_0

    L_T = KL(q(x_n | x_0) || N(0, α_n² s² + σ_n²))       the noise that `sample` starts from
    L_0 = -ln P(bin of x_0 under N(x̂_0(x_1), V))         the last step, for quantised data
    L_0 = -ln N(x_0; x̂_0(x_1), V)                        for continuous data

With a learned encoder (DiffEnc), x contains x_φ(x_0, λ), also in q, and μ is the mean of its steps
(`diffcore.core.encoding.encoded_mean`; Nielsen et al. 2024, 2310.19789).

Where each element has its own, learned level, the knots are those of the elements at
z ~ q(z | x_0), and the bound contains KL(q(z | x_0) || N(0, I)) (Sahoo et al. 2024, 2312.13236).

Each term is estimated at one x_t = α x_0 + σ ε, so that the sum takes one evaluation for each knot.
Ho et al. 2020 (2006.11239, eq. 5 and 13).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.encoding.encoded_mean import MeanEncoder, find_mean_encoder
from diffcore.core.estimate import require_posterior_mean
from diffcore.core.gaussian import (
    discretised_log_likelihood,
    gaussian_divergence,
    gaussian_log_density,
)
from diffcore.core.network import LearnedLevels, find_learned_levels
from diffcore.core.prediction import Prediction, edm_norm
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.core.transition import (
    last_log_variance_bounds,
    log_variance_bounds,
    posterior_mean,
)
from diffcore.evaluation.likelihood.bits import Likelihood, to_bits
from diffcore.evaluation.likelihood.density import check_points
from diffcore.evaluation.likelihood.dequantisation import DRAW_BITS, bin_width, check_values
from diffcore.guidance import CFG
from diffcore.guidance.reference import Condition
from diffcore.samplers import DDPM
from diffcore.sampling.generation import check_sampling, evaluation_mode, padded_chunks
from diffcore.schedules import Grid, Level, Real, Trailing

__all__ = ["CONTINUOUS_STEPS", "FIXED_VARIANCE", "Bound", "variational_bound"]

CONTINUOUS_STEPS = 1000
"""Number of steps by default for a schedule that is not a table."""
FIXED_VARIANCE = 1.0
"""v by default for a process without a learned variance."""


@dataclass(frozen=True, eq=False)
class Bound(Likelihood):
    """The variational bound in bits per dimension, and its parts, whose sum it is.

    Args:
        bits: (N,) bound of each sample, float64.
        evaluations: number of network evaluations for each sample.
        prior: (N,) L_T in bits per dimension.
        transitions: (N,) sum of the divergences of the steps in bits per dimension.
        decoder: (N,) L_0 in bits per dimension.
        latent: (N,) divergence of q(z | x_0) in bits per dimension; 0 without a latent.
    """

    prior: Tensor
    transitions: Tensor
    decoder: Tensor
    latent: Tensor


def variational_bound(
    denoiser: DenoiserProtocol,
    x0: Tensor,
    bins: int | None = None,
    *,
    grid: Grid = Trailing(),
    steps: int = 0,
    variance: float | None = None,
    condition: Condition = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Bound:
    """An upper bound, in expectation, on -log2 P(x_0) / D of each sample under DDPM's steps.

    The variance of a step is V = β̃^(1-v) β^v. The last step has β̃ = 0, so that its V is between the
    β̃ of the step before and β, as in iDDPM (Nichol & Dhariwal 2021, 2102.09672).

    For an exact denoiser the bound tends to the exact value as the number of steps grows: with
    v = 1 for continuous data, where it is exact at any number of steps for normal data of unit
    variance; with v = 0 for quantised data, whose values are known in the last steps. The other v
    keeps a distance on grids whose last steps change σ/α by a constant factor, such as `Trailing`.

    Args:
        denoiser: network with its process, or an exact denoiser.
        x0: (N, *shape) clean data in the range of the process.
        bins: number of equally spaced values of the data, see `Dequantisation`; None: the data are
            continuous, and the bound is that of their density.
        grid: rule that places the knots; the last one is clean.
        steps: number of steps; 0: every entry of a table, 1000 for a continuous schedule.
        variance: v within [0, 1], for all elements: 0 is β̃, 1 is β. None: that of the network if
            the variance of its process is learned, else 1.
        condition: N labels, a table of values by name, or None, as of `sample`.
        seed: 64-bit seed of the noise.
        first: position of the first sample, below 2^32, see `bits_per_dimension`.
        batch_size: number of samples in a call of the network.
        progress: True shows a progress bar.

    Returns:
        The bound of each sample, its parts, and the number of evaluations.

    Raises:
        ValueError: the arguments do not fit together, or the data has other values than the bins.
    """
    process, steps = denoiser.process, steps or denoiser.process.schedule.steps or CONTINUOUS_STEPS
    _check(process, x0, bins, variance)
    knots = grid.knots(process.schedule, steps)
    if len(knots) < 3 or float(knots[-1].sigma) != 0:
        raise ValueError(
            f"{grid} has {len(knots) - 1} steps to λ = {knots[-1].logsnr:g}, expected at least 2, "
            "the last one to the clean level: use more steps, or a grid that ends clean"
        )
    given = check_sampling(process, knots, range(len(x0)), condition, CFG(1.0), batch_size, DDPM())
    terms, device = [], denoiser.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    learned = find_learned_levels(denoiser.network)
    encoder = find_mean_encoder(denoiser.network)
    bar = tqdm(total=len(x0), unit="sample", disable=not progress)
    with torch.no_grad(), evaluation_mode(denoiser), bar:
        for rows, real in padded_chunks(len(x0), batch_size):
            x = x0[rows].to(device, dtype)
            chosen = None if given is None else given[rows].to(device)
            chain = _Chain(denoiser, x, chosen, seed, first + rows, variance, bins, encoder)
            levels, divergence = _spread(learned, knots, x, seed, first + rows)
            found = torch.cat([chain.terms(levels), divergence[None]])
            terms.append(found[:, :real].double().cpu())
            bar.update(real)
    parts = to_bits(process, -torch.cat(terms, 1))
    return Bound(parts.sum(0), len(knots) - 1, *parts.unbind())


def _spread(
    learned: LearnedLevels | None,
    knots: tuple[Level, ...],
    x0: Tensor,
    seed: int,
    position: Tensor,
) -> tuple[tuple[Level, ...], Tensor]:
    """The knots of the elements of data, and the divergence (B,) of their latents in nats."""
    if learned is None:
        return knots, x0.new_zeros(len(x0))
    latent = learned.encode(x0, seed, position)
    return learned.knots(knots, latent.z), latent.divergence


@dataclass(frozen=True, eq=False)
class _Chain:
    """The terms of a batch in nats.

    Args:
        denoiser: network with its process.
        x0: (B, *shape) data on the device of the network.
        condition: condition of the batch, or None.
        seed: seed of the noise.
        position: (B,) positions of the samples, the key of their noise.
        variance: v of every step, or None for that of the network.
        bins: number of values of the data, or None.
        encoder: encoder of the process, or None.
    """

    denoiser: DenoiserProtocol
    x0: Tensor
    condition: BatchCondition | None
    seed: int
    position: Tensor
    variance: float | None
    bins: int | None
    encoder: MeanEncoder | None

    def terms(self, knots: tuple[Level, ...]) -> Tensor:
        """L_T, the sum of the divergences, and L_0, of shape (3, B)."""
        total = self.x0.new_zeros(len(self.x0))
        for index, (t, s) in enumerate(pairwise(knots[:-1])):
            total += self._transition(t, s, index)
        return torch.stack([self._prior(knots[0]), total, self._decoder(knots)])

    def _prior(self, level: Level) -> Tensor:
        """KL(q(x_n | x_0) || N(0, α² s² + σ²))."""
        scale = edm_norm(level, self.denoiser.process.sigma_data)
        own, other = (2 * self._tensor(std).log() for std in (level.sigma, scale))
        mean = self._truth(torch.zeros_like(self.x0)).at(level)
        return _sum(gaussian_divergence(mean, own, self._tensor(0.0), other))

    def _transition(self, t: Level, s: Level, index: int) -> Tensor:
        """KL(q(x_s | x_t, x_0) || N(μ, V))."""
        truth, prediction = self._predict(t, index)
        lower, upper = (self._tensor(bound) for bound in log_variance_bounds(t, s))
        means = (posterior_mean(pair, t, s) for pair in (truth, prediction))
        log_variance = lower + self._v(prediction) * (upper - lower)
        true_mean, mean = means
        return _sum(gaussian_divergence(true_mean, lower, mean, log_variance))

    def _decoder(self, knots: tuple[Level, ...]) -> Tensor:
        """-ln of the probability or density of x_0 given x at the last noisy level."""
        before, level, _ = knots[-3:]
        _, prediction = self._predict(level, len(knots) - 2)
        bounds = last_log_variance_bounds(before, level)
        lower, upper = (self._tensor(bound) for bound in bounds)
        log_variance = lower + self._v(prediction) * (upper - lower)
        if self.bins is None:
            return -_sum(gaussian_log_density(self.x0, prediction.x0, log_variance))
        process = self.denoiser.process
        return -_sum(
            discretised_log_likelihood(
                self.x0, prediction.x0, log_variance, process.low, process.high, self.bins
            )
        )

    def _predict(self, level: Level, index: int) -> tuple[Prediction, Prediction]:
        """The true and the predicted x_0 and ε of a noisy copy of the data."""
        key = self.position + (index << DRAW_BITS)
        shape, device, dtype = self.x0.shape[1:], self.x0.device, self.x0.dtype
        truth = self._truth(normal(self.seed, Stream.BOUND, key, shape, device, dtype))
        return truth, self.denoiser(truth.at(level), level, self.condition)

    def _truth(self, eps: Tensor) -> Prediction:
        """x_0 and ε, with the encoding of x_0 if the process has one."""
        encoding = None if self.encoder is None else self.encoder.encode
        return Prediction(self.x0, eps, encoding=encoding)

    def _v(self, prediction: Prediction) -> Tensor:
        """v of the variance of a step, a number or of the shape of x."""
        if self.variance is None and prediction.variance is not None:
            return prediction.variance
        return self._tensor(FIXED_VARIANCE if self.variance is None else self.variance)

    def _tensor(self, value: Real) -> Tensor:
        """A number, or a map of the host, in the dtype and on the device of x."""
        return torch.as_tensor(value, dtype=torch.float64).to(self.x0)


def _sum(values: Tensor) -> Tensor:
    """The sum over the elements of each sample."""
    return values.flatten(1).sum(1)


def _check(process: Process, x0: Tensor, bins: int | None, variance: float | None) -> None:
    check_points(process, x0)
    if process.estimate not in DDPM().estimates:
        require_posterior_mean(process, "the variational bound")
    if variance is not None and not 0 <= variance <= 1:
        raise ValueError(f"variance is {variance}, expected v within [0, 1]: 0 is β̃, 1 is β")
    if bins is not None:
        bin_width(process, bins)
        check_values(process, x0, bins)
