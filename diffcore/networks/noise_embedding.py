"""Networks with a latent vector of random numbers, which makes their output random."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.core.condition_values import SEED_BYTES, seeds_of_bytes
from diffcore.core.network import NetworkAdapter, network_config
from diffcore.core.random import Stream, normal
from diffcore.networks.time_embedding import build_addition, features_added_to_time

__all__ = ["NoiseEmbedding", "draw_latent"]


class NoiseEmbedding(NetworkAdapter):
    """A network with a latent vector z, which is embedded beside the time.

        e = E(t) + W' silu(W z + b) + b',   F = network(x, t, ...) with e for E(t),   z ~ N(0, I)

    E is the network's own embedding of the time t. W' and b' are 0 at initialisation, so that the
    network starts as the one without z: a run can start from the weights of that one (`init`). z is
    a function of the sample's seed and of the time, so that each step of a sample has its own. The
    process has the condition `seed_bytes`, which sampling and training fill: a shape of (8,) in
    [0, 255], with absent: null and null: [0]. `DenoisingGAN` trains it.

    Source: Xiao et al. 2021 (2112.07804, appendix C) modulate the features of each block by an
    embedding of z, of which they use 100 numbers.

    Args:
        network: class and options of the network: a UNet2DModel, UNet2DConditionModel or
            DiTTransformer2DModel of diffusers, a Perceptron or UNet3d, or one whose embedding is
            named in `embeddings`.
        size: number of elements of z, at least 1.
        embeddings: names of the modules that embed the time, (B, width) each; []: found by the
            names that diffusers gives them.

    Raises:
        ValueError: no module embeds the time, or the size is below 1.

    Example:
        >>> from diffcore.core.condition_values import seed_bytes
        >>> from diffcore.networks import Perceptron
        >>> network = NoiseEmbedding(lambda: Perceptron([2], width=8))
        >>> x, time, seeds = torch.zeros(2, 2), torch.ones(2), torch.tensor([5, 6])
        >>> network(x, time, seed_bytes=seed_bytes(seeds)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, network: Callable[[], nn.Module], size: int = 64, embeddings: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1 element of z")
        self.network, self.size = network(), size
        self.config = network_config(self.network)
        self.latent = build_addition(self.network, embeddings, size)

    def forward(
        self, x: Tensor, timestep: Tensor, seed_bytes: Tensor | None = None, **arguments: Any
    ) -> Any:
        """The network's output for x, the time and the latent of the seeds.

        Args:
            x: noisy samples (B, *shape).
            timestep: time input (B,) of the level of x.
            seed_bytes: (B, 8) bytes of the seed of each sample, from 0 to 255.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.

        Raises:
            ValueError: the seeds are missing.
        """
        z = draw_latent(seed_bytes, timestep, (self.size,), x)
        with features_added_to_time(self.latent, z):
            return self.network(x, timestep, **arguments)


def draw_latent(
    numbers: Tensor | None, time: Tensor, shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """The latent z of each sample, a function of its seed and of the time.

    Args:
        numbers: (B, 8) bytes of the seeds, from 0 to 255; None if they are missing.
        time: time conditioning (B,).
        shape: shape of one z.
        like: tensor of the device and the type of z.

    Returns:
        z (B, *shape), standard normal.

    Raises:
        ValueError: the seeds are missing.
    """
    if numbers is None:
        raise ValueError(
            f"the process has no condition {SEED_BYTES}, from which the latent of the network is "
            f"drawn: give process.conditions a {SEED_BYTES} of shape [8], low: 0, high: 255, "
            "absent: null and null: [0]"
        )
    position = time.float().view(torch.int32)
    return normal(
        seeds_of_bytes(numbers), Stream.INPUT_NOISE, position, shape, like.device, like.dtype
    )
