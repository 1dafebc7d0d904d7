"""Learned noise levels: each element of x has its own level, a function of time and of a latent z.

    x_i = α(λ_i) x_0i + σ(λ_i) ε_i,   λ_i(t, z) = λ(τ_i(t, z)),   z ~ q(z | x_0)

τ_i is a monotone map of [0, 1] onto itself, so that the elements share the ends of the schedule and
not the way between them. In the bound of such a process (Sahoo et al. 2024, 2312.13236),

    -ln p(x_0) ≤ KL(q(z | x_0) || N(0, I)) + L_T + ½ E_t Σ_i -(dλ_i/dt) SNR_i (x_0i - x̂_0i)² + L_0

the diffusion term is a line integral through the space of all λ_i. It does not depend on τ where
the squared error is that of an exact denoiser, and does where it is that of a network. Samples
begin with z ~ N(0, I).

The network contains the levels (`LearnedLevelsNetwork`), so that averages, checkpoints and runs
hold both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffcore.core.gaussian import gaussian_divergence
from diffcore.core.network import Latent, LearnedLevels, network_config
from diffcore.core.random import Stream, normal
from diffcore.schedules import Level, LogLinear, Schedule, alpha_sigma

__all__ = ["LatentEncoder", "LearnedLevelsNetwork", "PixelPolynomial"]

SMALLEST = 1e-3
"""Lower bound of c, so that τ is strictly monotone at t = 0."""
UNIT = math.log(math.expm1(1 - SMALLEST))
"""Value of the parameter of c at which c = 1."""


class PixelPolynomial(nn.Module):
    """Times τ_i(t, z) of all elements: polynomials of degree 5 from 0 to 1.

        τ = P(t)/P(1),   P' = (a t² + b t + c)²,   c ≥ 0.001

    a, b and c of each element are parameters, or the output of a perceptron of z. They begin at 0,
    0 and 1, where τ = t.

    Sahoo et al. 2024 (2312.13236, section 3.2 and the authors' code).

    Args:
        shape: shape of one x_0.
        latent: number L of elements of z; 0: the levels depend on t alone.
        width: hidden features of the perceptron.
    """

    def __init__(self, shape: Sequence[int], latent: int = 0, width: int = 128) -> None:
        super().__init__()
        self.shape, self.latent = tuple(shape), latent
        size = 3 * math.prod(self.shape)
        start = torch.zeros(3, *self.shape)
        start[2] = UNIT
        if not latent:
            self.coefficients = nn.Parameter(start)
            return
        self.layers = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, size)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.copy_(start.flatten())

    def forward(self, t: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """τ and dτ/dt of each element.

        Args:
            t: times in [0, 1] of each sample, (B, 1, ..., 1) or (1, 1, ..., 1).
            z: (B, L) latents; None without them.

        Returns:
            Two tensors that broadcast against (B, *shape), in the dtype and on the device of t.
        """
        if self.latent:
            assert z is not None
            raw = self.last(self.layers(z.to(self.last.weight))).view(-1, 3, *self.shape)
        else:
            raw = self.coefficients[None]
        a, b, c = raw.to(t).unbind(1)
        c = SMALLEST + softplus(c)
        # P' = Σ_k m_k t^k
        moments = (c * c, 2 * b * c, b * b + 2 * a * c, 2 * a * b, a * a)
        total = sum(m / (k + 1) for k, m in enumerate(moments))
        time = sum(m * t ** (k + 1) / (k + 1) for k, m in enumerate(moments)) / total
        return time, ((a * t + b) * t + c).square() / total


class LatentEncoder(nn.Module):
    """q(z | x_0) = N(m(x_0), diag v(x_0)), a perceptron of all elements; N(0, 1) at first.

    Args:
        size: number D of elements of x_0.
        latent: number L of elements of z.
        width: hidden features.
    """

    def __init__(self, size: int, latent: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, 2 * latent)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """m and ln v.

        Args:
            x0: (B, *shape) clean data.

        Returns:
            Two tensors (B, L).
        """
        mean, log_variance = self.last(self.layers(x0.flatten(1))).chunk(2, 1)
        return mean, log_variance


class LearnedLevelsNetwork(LearnedLevels):
    """A network with the learned levels of its process, for `process.levels: learned`.

        F = network(x, t̄),   t̄ the mean over the elements of the time conditioning of their levels

    With `channels`, the network also sees the time of each element, as further channels of x. Then
    it knows all levels; otherwise it knows their mean, and z has an effect on x alone.

    Args:
        network: class and options of the network, with C input channels, or 2C with `channels`.
        shape: shape of one x_0, with C channels.
        latent: number of elements of z; 0: levels that depend on t alone.
        channels: whether the network sees the times of the elements.
        scale: time conditioning that stands for 1 in these channels, as `process.time.scale`.
        width: hidden features of the perceptrons of the levels and of q(z | x_0).

    Raises:
        ValueError: a number is out of range, or the input channels do not fit.

    Example:
        >>> from diffcore.networks import Perceptron
        >>> from diffcore.schedules import LogLinear
        >>> network = LearnedLevelsNetwork(lambda: Perceptron([2], width=8), [2])
        >>> level, slope = network.spread(LogLinear(), torch.tensor([[0.5]]), None)
        >>> level.t.detach(), slope.detach()
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        shape: Sequence[int],
        latent: int = 0,
        channels: bool = False,
        scale: float = 1000.0,
        width: int = 128,
    ) -> None:
        super().__init__(shape)
        if latent < 0 or width < 1 or not scale:
            raise ValueError(
                f"latent is {latent}, width {width} and scale {scale}, expected at least 0 "
                "elements of z, at least 1 feature, and a scale other than 0"
            )
        self.network = network()
        self.config = network_config(self.network)
        inputs, outputs = (self.config.get(f"{end}_channels") for end in ("in", "out"))
        if channels and None not in (inputs, outputs) and inputs != 2 * shape[0]:
            raise ValueError(
                f"the network has {inputs} input channels, and with `channels` receives "
                f"{2 * shape[0]}: set its in_channels to {2 * shape[0]}, or channels to false"
            )
        self.levels = PixelPolynomial(shape, latent, width)
        self.encoder = LatentEncoder(math.prod(shape), latent, width) if latent else None
        self.channels, self.scale = channels, scale

    def forward(self, x: Tensor, time: Tensor, **arguments: Any) -> Any:
        """The network's output.

        Args:
            x: (B, C, ...) noisy samples.
            time: time conditioning of a map of levels, which broadcasts against x.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.
        """
        if time.ndim == 1:  # of data with one element
            time = time[:, None]
        time = time.expand(len(x), *self.shape)
        inputs = torch.cat((x, (time / self.scale).to(x)), 1) if self.channels else x
        return self.network(inputs, time.flatten(1).mean(1), **arguments)

    def spread(self, schedule: Schedule, t: Tensor, z: Tensor | None) -> tuple[Level, Tensor]:
        assert isinstance(schedule, LogLinear)
        time, slope = self.levels(t, z)
        logsnr = schedule.high + (schedule.low - schedule.high) * time
        level = Level(logsnr, time, *alpha_sigma(logsnr, schedule.scaling), schedule=schedule)
        return level, slope

    def sample_latent(self, seeds: Tensor) -> Tensor | None:
        return self._normal(seeds, torch.zeros_like(seeds)) if self.levels.latent else None

    def encode(self, x0: Tensor, seed: int, position: Tensor) -> Latent:
        if x0.shape[1:] != self.shape:
            raise ValueError(
                f"x_0 has the shape {tuple(x0.shape[1:])}, and the learned levels have "
                f"{self.shape}: set shape of LearnedLevelsNetwork to that of the data, "
                "which cannot be in buckets of several sizes"
            )
        if self.encoder is None:
            return Latent(None, x0.new_zeros(len(x0)))
        mean, log_variance = self.encoder(x0.to(self.levels.last.weight))
        z = mean + (log_variance / 2).exp() * self._normal(seed, position).to(mean)
        zero = mean.new_zeros(())
        return Latent(z, gaussian_divergence(mean, log_variance, zero, zero).sum(1).to(x0))

    def _normal(self, seed: int | Tensor, position: Tensor) -> Tensor:
        weight = self.levels.last.weight
        z = normal(seed, Stream.LEVEL_LATENT, position, (self.levels.latent,))
        return z.to(weight)
