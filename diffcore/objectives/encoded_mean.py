"""The loss of a process with a learned encoder of x_0 (DiffEnc).

    L = mean [½ (λ_max - λ_min) SNR (1 + k)² (x̂_φ - x*)²] + KL(q(x_1 | x_0) || p(x_1))/D

    x* = (x_φ + dx_φ/dλ)/(1 + k),   x = α x_φ + σ ε

is in expectation over t the diffusion term of the bound and that of the noisiest level, in nats per
dimension. The decoder term is left out, as for a process without an encoder: near the clean level
x_φ is x_0 + O(σ²). The gradient of the encoder passes through x, x* and the last term.

Nielsen et al. 2024 (2310.19789) and the authors' code, whose loss on v it is for c = 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.encoding.encoded_mean import find_mean_encoder
from diffcore.core.gaussian import gaussian_divergence
from diffcore.core.prediction import edm_norm
from diffcore.schedules import Level

__all__ = ["TrainingPair", "training_pair"]


class TrainingPair(NamedTuple):
    """What x contains, and what the network is trained to estimate.

    Args:
        mean: content of x beside the noise, of the shape of x_0: x_0, or x_φ.
        x0: estimated x_0, of the same shape.
        eps: ε that makes x with it, where x has the noise of the target.
        weight: factor of the weight of the error.
        prior: (B,) divergence at the noisiest level in nats for each element; 0 without encoder,
            where it is constant.
    """

    mean: Tensor
    x0: Tensor
    eps: Tensor
    weight: Tensor | float
    prior: Tensor | float


def training_pair(denoiser: Denoiser, x0: Tensor, eps: Tensor, level: Level) -> TrainingPair:
    """The pair (x_0, ε) of samples, or if the process has an encoder, that of their encoding.

    Args:
        denoiser: network with its process.
        x0: (B, *shape) clean samples, at least float32.
        eps: noise, of the shape of x_0.
        level: level of each sample, on the device of x_0.

    Returns:
        The pair with its weight.
    """
    process = denoiser.process
    if process.estimate != "encoded_mean":
        return TrainingPair(x0, x0, eps, 1.0, 0.0)
    encoder = find_mean_encoder(denoiser.network)
    assert encoder is not None
    mean, offset, factor = encoder.target(x0, level)
    last = process.schedule.level(1.0)
    own, other = (
        torch.tensor([last.sigma, edm_norm(last, process.sigma_data)], dtype=torch.float64)
        .to(x0)
        .square()
        .log()
    )
    prior = gaussian_divergence(
        last.alpha * encoder.encode(x0, last), own, torch.zeros_like(own), other
    )
    return TrainingPair(
        mean,
        mean + offset,
        eps - level.alpha / level.sigma * offset,
        factor.square(),
        prior.flatten(1).mean(1),
    )
