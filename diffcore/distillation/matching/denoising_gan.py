"""Denoising diffusion GAN: a student of large denoising steps with a latent input.

x̃_0 = G(x_t, z, t),   x̃_s ~ q(x_s | x_t, x̃_0),   D(x_s, x_t, t)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.core.process import Process
from diffcore.distillation.matching.adversarial import AdversarialObjective, Comparison
from diffcore.distillation.matching.discriminator import NetworkDiscriminator
from diffcore.distillation.matching.student import rollout_noise
from diffcore.networks.noise_embedding import draw_latent
from diffcore.objectives.draw import Draw
from diffcore.objectives.networks import Networks
from diffcore.run import NetworkFactory
from diffcore.samplers.base import is_clean
from diffcore.schedules import Level

__all__ = ["DenoisingGAN", "NoiseChannels", "posterior"]


class NoiseChannels(nn.Module):
    """A network with the latent z as further channels of its input.

        F(x, t) = network([x, z], t), the first C channels,   z ~ N(0, I) of k channels

    z is a function of the sample's seed and of the time, so that each step of a sample has its own.
    The process has the condition `seed_bytes`, which sampling and training fill: a shape of (8,)
    in [0, 255], with absent: null and null: [0].

    Args:
        network: network for C + k channels.
        channels: k, at least 1.

    Raises:
        ValueError: `channels` is below 1.

    Example:
        >>> from diffcore.core.condition_values import seed_bytes
        >>> from diffcore.networks import Perceptron
        >>> network = NoiseChannels(lambda: Perceptron([3]))
        >>> x, time, seeds = torch.zeros(2, 2), torch.ones(2), torch.tensor([5, 6])
        >>> network(x, time, seed_bytes=seed_bytes(seeds)).shape
        torch.Size([2, 2])
    """

    def __init__(self, network: NetworkFactory, channels: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}, expected at least 1")
        self.network, self.channels = network(), channels

    def forward(
        self, x: Tensor, time: Tensor, seed_bytes: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """The first C channels of the output.

        Args:
            x: (B, C, ...) noisy samples.
            time: time conditioning (B,).
            seed_bytes: (B, 8) bytes of the seed of each sample, from 0 to 255.
            **conditions: conditions of the network.

        Raises:
            ValueError: the seeds are missing.
        """
        z = draw_latent(seed_bytes, time, (self.channels, *x.shape[2:]), x)
        output = extract_tensor(self.network(torch.cat((x, z), 1), time, **conditions))
        return output[:, : x.shape[1]]


@dataclass(frozen=True)
class DenoisingGAN(AdversarialObjective):
    """DDGAN: the conditional distribution of x_s given x_t is compared, t and s neighbouring knots.

    The discriminator has a network for 2C channels, [x_s, x_t], conditioned on t. The student is
    a network with an input of noise, `NoiseEmbedding` or `NoiseChannels`: without it, x_0 given x_t
    is one point. The R1 penalty is that of both arguments. Sample the student with `Consistency` on
    the same knots.

    Source: Xiao et al. 2021 (2112.07804).
    """

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the discriminator cannot compare pairs, or the process does not fit.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        super().check(process, inputs)
        if not isinstance(self.discriminator, NetworkDiscriminator):
            raise ValueError(
                f"discriminator is {type(self.discriminator).__name__}, but DenoisingGAN compares "
                "pairs [x_s, x_t]: use NetworkDiscriminator with a network for 2C channels"
            )

    def compare(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Comparison:
        knots, index = self.student.knots(denoiser.process.schedule), self.student.step_index(draw)
        t, s = knots[index : index + 2]
        x0 = x0.to(draw.noise)
        x_s = x0 if is_clean(s) else s.alpha * x0 + s.sigma * rollout_noise(draw, 0)
        a, b = _transition(t, s)
        x_t = a * x_s + b * draw.noise
        sample = denoiser(x_t, t, condition).x0
        fake = posterior(x_t, sample, t, s, rollout_noise(draw, 1))
        return Comparison(torch.cat((x_s, x_t), 1), torch.cat((fake, x_t), 1), t)


def _transition(t: Level, s: Level) -> tuple[float, float]:
    """a and b of x_t = a x_s + b ε for a cleaner level s."""
    a = float(t.alpha) / float(s.alpha)
    return a, max(float(t.sigma) ** 2 - (a * float(s.sigma)) ** 2, 0.0) ** 0.5


def posterior(x: Tensor, x0: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
    """A sample of q(x_s | x_t, x_0), which is x_0 at a clean level s.

        mean (a σ_s² x_t + α_s b² x_0) / σ_t²,   variance σ_s² b² / σ_t²,   x_t = a x_s + b ε

    Args:
        x: x_t (B, *shape).
        x0: x_0, of the same shape.
        t: level of x_t.
        s: cleaner level.
        noise: standard normal noise of the same shape.

    Returns:
        x_s, of the same shape.
    """
    if is_clean(s):
        return x0
    a, b = _transition(t, s)
    variance = float(t.sigma) ** 2
    mean = (a * float(s.sigma) ** 2 / variance) * x + (float(s.alpha) * b**2 / variance) * x0
    return mean + float(s.sigma) * b / float(t.sigma) * noise
