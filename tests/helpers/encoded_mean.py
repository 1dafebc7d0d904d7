"""Exact denoisers of normal data whose mean is encoded linearly, and their bounds in closed form.

    x_φ = M(λ) x_0,   M = α² + c σ² + a σ² (depth - depth²)

so that h = a (depth - depth²) x_0. x̂_φ is E[x* | x], x* = (M + M')/(1 + k) x_0.
"""

import math

import torch
from scipy.integrate import quad
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.encoding.encoded_mean import MeanEncoder
from diffcore.core.process import Process, TimeConditioning
from diffcore.schedules import LogLinear, Schedule

SCHEDULE = LogLinear(-5.0, 7.0)


class LinearEncoder(MeanEncoder):
    """The exact network of normal data of variance s², at λ = time; it predicts x_φ."""

    def __init__(self, share: float, gain: float, variance: float, schedule: Schedule) -> None:
        super().__init__(share)
        self.gain, self.variance = gain, variance
        self.high, self.low = schedule.logsnr(0.0), schedule.logsnr(1.0)

    def residual(self, x0: Tensor, depth: Tensor) -> Tensor:
        return self.gain * (depth - depth * depth) * x0

    def factors(self, logsnr: float) -> tuple[float, float, float]:
        """M, dM/dλ and k."""
        alpha2, sigma2 = 1 / (1 + math.exp(-logsnr)), 1 / (1 + math.exp(logsnr))
        depth, width = (self.high - logsnr) / (self.high - self.low), self.high - self.low
        h, slope = self.gain * (depth - depth**2), -self.gain * (1 - 2 * depth) / width
        linear, product = alpha2 + self.share * sigma2, alpha2 * sigma2
        rate = (1 - self.share) * product / linear
        return linear + sigma2 * h, product * (1 - self.share - h) + sigma2 * slope, rate

    def error(self, logsnr: float) -> float:
        """E (x_0 - E[x_0 | x])²."""
        factor, _, _ = self.factors(logsnr)
        return self.variance / (1 + math.exp(logsnr) * factor**2 * self.variance)

    def weight(self, logsnr: float) -> float:
        """K with x̂_φ = K x, in the vp scaling."""
        factor, slope, rate = self.factors(logsnr)
        alpha, sigma2 = (1 + math.exp(-logsnr)) ** -0.5, 1 / (1 + math.exp(logsnr))
        posterior = alpha * factor * self.variance
        posterior /= alpha**2 * factor**2 * self.variance + sigma2
        return (factor + slope) / (1 + rate) * posterior

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        weights = [self.weight(float(logsnr)) for logsnr in time]
        return torch.tensor(weights, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1)) * x


def denoiser(share: float, gain: float = 0.0, variance: float = 0.6) -> Denoiser:
    """The exact denoiser of one normal number of this variance."""
    time = TimeConditioning("logsnr", 1.0)
    process = Process(SCHEDULE, "sample", time, shape=(1,), sigma_data=1.0, estimate="encoded_mean")
    return Denoiser(LinearEncoder(share, gain, variance, SCHEDULE).double(), process)


def diffusion_integral(network: LinearEncoder) -> float:
    """½ ∫ SNR (M + M')² E(x_0 - E[x_0 | x])² dλ in nats."""

    def rate(logsnr: float) -> float:
        factor, slope, _ = network.factors(logsnr)
        return math.exp(logsnr) * (factor + slope) ** 2 * network.error(logsnr) / 2

    return quad(rate, network.low, network.high, epsabs=1e-11, epsrel=1e-11)[0]
