"""Learned encoders of x_0, whose encoding in x depends on the noise level (DiffEnc).

    x = α x_φ(x_0, λ) + σ ε,   x_φ = m(λ) x_0 + σ² h(x_0, λ),   m = α² + c σ²

with α² = sigmoid(λ) and σ² = sigmoid(-λ) in x_φ and m for every scaling. Nielsen et al. 2024
(2310.19789) learn h with c = 0. With h = 0 and c = 1 the process is the plain one.

A step from t to s keeps the variance of the plain process, so that its mean given x_0 is

    α_s x_φ(x_0, λ_s) + σ_s r ε,   r = u_s/u_t of u = σ/α

The network estimates it from x: with x̂_φ and ε̂ of its output it is α_s (m_s/m_t) x̂_φ + σ_s r ε̂,
which is exact in x̂_φ for h = 0. At first order in λ_s - λ_t the factor m_s/m_t is that of the
source, 1 + (λ_s - λ_t) k(λ_t) with k = d ln m/dλ, which is σ² for c = 0. In continuous time the
bound of such steps is

    ½ ∫ SNR |(1 + k) x̂_φ - (x_φ + dx_φ/dλ)|² dλ + terms of the ends
"""

from abc import abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffcore.core.encoding.forward_mode import differentiate_forward
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.schedules import Level

__all__ = [
    "EncodedTarget",
    "MeanEncoder",
    "check_mean_encoder",
    "decode_prediction",
    "find_mean_encoder",
]


class EncodedTarget(NamedTuple):
    """What a network of an encoded process is trained to estimate at a level.

    Args:
        mean: x_φ, which x contains.
        offset: x* - x_φ, where x* = (x_φ + dx_φ/dλ)/(1 + k) is the target of x̂_φ.
        factor: 1 + k, the factor of the error of x̂_φ in the bound.
    """

    mean: Tensor
    offset: Tensor
    factor: Tensor


class MeanEncoder(nn.Module):
    """A network that contains the encoder of x_0 of its process (`Process.estimate` encoded_mean).

    Args:
        share: c within [0, 1], the share of x_0 that its encoding contains at pure noise without h.

    Raises:
        ValueError: the share is out of range.
    """

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, expected c within [0, 1]: 0 as in DiffEnc")
        self.share = share

    @abstractmethod
    def residual(self, x0: Tensor, depth: Tensor) -> Tensor:
        """h(x_0, λ), with the gradient of the encoder.

        Args:
            x0: (B, *shape) clean data.
            depth: (λ_max - λ)/(λ_max - λ_min) of each sample within the schedule, in [0, 1], (B,
                1, ..., 1) or (1, 1, ..., 1) in the dtype of x_0: 0 is the cleanest level.

        Returns:
            A tensor of the shape and dtype of x_0, which is differentiable by the depth in
            forward mode.
        """

    def linear(self, x0: Tensor, level: Level) -> Tensor:
        """m(λ) x_0: the encoding without h, and what a prediction of x_0 contributes to x.

        Args:
            x0: (B, *shape) clean data.
            level: level of the encoding, on the device of x_0.
        """
        return self._factor(_logsnr(x0, level)) * x0

    def encode(self, x0: Tensor, level: Level) -> Tensor:
        """x_φ(x_0, λ), of the shape of x_0.

        Args:
            x0: (B, *shape) clean data.
            level: level of the encoding, on the device of x_0; x_0 itself at the clean level.
        """
        logsnr = _logsnr(x0, level)
        return self._factor(logsnr) * x0 + self._residual(x0, logsnr, level)

    def target(self, x0: Tensor, level: Level) -> EncodedTarget:
        """x_φ, and what the network is trained to estimate.

        Args:
            x0: (B, *shape) clean data.
            level: level of each sample, on the device of x_0.
        """
        logsnr = _logsnr(x0, level)

        def residual(logsnr: Tensor) -> Tensor:
            return self._residual(x0, logsnr, level)

        value, slope = differentiate_forward(residual, (logsnr,), (torch.ones_like(logsnr),))
        rate = self._rate(logsnr)
        mean = self._factor(logsnr) * x0 + value
        return EncodedTarget(mean, (slope - rate * value) / (1 + rate), 1 + rate)

    def decode(self, mean: Tensor, level: Level) -> Tensor:
        """x̂_φ/m(λ), the estimate of x_0 for an estimate of x_φ, of its shape.

        Args:
            mean: (B, *shape) estimate of x_φ.
            level: its level, on the device of the estimate.
        """
        return mean / self._factor(_logsnr(mean, level))

    def _factor(self, logsnr: Tensor) -> Tensor:
        """m = α² + c σ²."""
        return logsnr.sigmoid() + self.share * (-logsnr).sigmoid()

    def _rate(self, logsnr: Tensor) -> Tensor:
        """k = d ln m/dλ = (1 - c) α² σ²/m."""
        product = logsnr.sigmoid() * (-logsnr).sigmoid()
        return (1 - self.share) * product / self._factor(logsnr)

    def _residual(self, x0: Tensor, logsnr: Tensor, level: Level) -> Tensor:
        """σ² h; 0 at the clean level."""
        high, low = level.schedule.logsnr(0.0), level.schedule.logsnr(1.0)
        depth = (high - logsnr.clamp(low, high)) / (high - low)
        return (-logsnr).sigmoid() * self.residual(x0, depth)


def _logsnr(x0: Tensor, level: Level) -> Tensor:
    """λ as a tensor that broadcasts against x_0, in its dtype."""
    logsnr = torch.as_tensor(level.logsnr).to(x0)
    return logsnr if logsnr.ndim else logsnr.view([1] * x0.ndim)


def find_mean_encoder(network: nn.Module | None) -> MeanEncoder | None:
    """The part of a network that contains an encoder of x_0.

    Args:
        network: network of a denoiser, possibly inside wrappers.

    Returns:
        The module, or None without one.
    """
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return next((each for each in modules if isinstance(each, MeanEncoder)), None)


def check_mean_encoder(network: nn.Module, process: Process) -> None:
    """Raise ValueError if a network contains no encoder and should, or the reverse.

    Args:
        network: network of a denoiser.
        process: its process.
    """
    encoder = find_mean_encoder(network)
    if (encoder is not None) != (process.estimate == "encoded_mean"):
        raise ValueError(
            f"the process has estimate {process.estimate}, and the network contains "
            f"{'no' if encoder is None else 'an'} encoder of x_0: set process.estimate to "
            "encoded_mean with a MeanEncoderNetwork, and to posterior_mean with any other network"
        )


def decode_prediction(network: nn.Module, prediction: Prediction, level: Level) -> Prediction:
    """The prediction of x_0 and ε for that of x_φ and ε.

    Args:
        network: network that contains the encoder.
        prediction: estimates of x_φ and ε.
        level: level of the estimates, on their device.

    Returns:
        The prediction, whose `at` is the mean α_s m_s x_0 + σ_s ε at each level s.
    """
    encoder = find_mean_encoder(network)
    assert encoder is not None
    return replace(prediction, x0=encoder.decode(prediction.x0, level), encoding=encoder.linear)
