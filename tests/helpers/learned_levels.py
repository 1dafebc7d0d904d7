"""Exact and wrong denoisers of normal data at levels of each element, and their bound."""

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import LevelType, Process, TimeConditioning
from diffcore.networks.learned_levels import LearnedLevelsNetwork
from diffcore.schedules import LogLinear

SCHEDULE = LogLinear(-7.0, 6.0)


class LinearNetwork(nn.Module):
    """E[x_0 | x] of normal data, at the λ_i in further channels of x, or at λ = time."""

    def __init__(self, covariance: Tensor) -> None:
        super().__init__()
        self.register_buffer("covariance", covariance)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        size = len(self.covariance)
        noisy, logsnr = x[:, :size], x[:, size:]
        logsnr = logsnr if logsnr.shape[1] else time[:, None].expand_as(noisy)
        return (gain(self.covariance.to(x), logsnr) @ noisy[:, :, None])[:, :, 0]


def gain(covariance: Tensor, logsnr: Tensor) -> Tensor:
    """K (B, D, D) with E[x_0 | x] = K x in the vp process, for λ (B, D)."""
    alpha, sigma = torch.diag_embed(logsnr.sigmoid().sqrt()), torch.diag_embed((-logsnr).sigmoid())
    return covariance @ alpha @ torch.linalg.inv(alpha @ covariance @ alpha + sigma)


def process(size: int, levels: LevelType = "learned") -> Process:
    """The process of data of D channels."""
    time = TimeConditioning("logsnr", 1.0)
    return Process(SCHEDULE, "sample", time, shape=(size,), sigma_data=1.0, levels=levels)


def denoiser(
    covariance: Tensor, latent: int = 0, seed: int | None = None, channels: bool = True
) -> Denoiser:
    """A denoiser that takes data of D channels for normal with this covariance.

    Args:
        covariance: (D, D) covariance.
        latent: number of elements of z.
        seed: seed of random levels; None: τ = t.
        channels: whether it knows the level of each element; if not, it takes their mean for each.
    """
    record = process(len(covariance))
    network = LearnedLevelsNetwork(
        lambda: LinearNetwork(covariance), record.shape, latent, channels, scale=1.0, width=8
    )
    if seed is not None:
        randomize(network, seed)
    return Denoiser(network.double(), record)


@torch.no_grad()
def randomize(network: LearnedLevelsNetwork, seed: int) -> None:
    """Add normal numbers to all parameters of the levels and of q(z | x_0)."""
    generator = torch.Generator().manual_seed(seed)
    for module in (network.levels, network.encoder):
        for parameter in () if module is None else module.parameters():
            size = 0.4 if network.levels.latent else 2.0
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def diffusion_integral(
    network: LearnedLevelsNetwork, assumed: Tensor, true: Tensor, count: int = 4000
) -> Tensor:
    """½ ∫ Σ_i -(dλ_i/dt) SNR_i E(x_0i - x̂_0i)² dt in nats, by the midpoint rule, with its gradient.

    x̂_0 is exact for the assumed covariance, at the levels of the elements or at their mean as
    `network.channels` determines it, and the data have the true covariance.
    """
    t = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    level, slope = network.spread(SCHEDULE, t, None)
    logsnr = level.logsnr
    assert isinstance(logsnr, Tensor)
    known = logsnr if network.channels else logsnr.mean(1, keepdim=True).expand_as(logsnr)
    k, alpha = gain(assumed, known), torch.diag_embed(logsnr.sigmoid().sqrt())
    rest = torch.eye(len(true), dtype=torch.float64) - k @ alpha
    error = rest @ true @ rest.mT + k @ torch.diag_embed((-logsnr).sigmoid()) @ k.mT
    rate = (SCHEDULE.high - SCHEDULE.low) * slope
    return (rate * logsnr.exp() * error.diagonal(dim1=1, dim2=2)).sum(1).mean() / 2
