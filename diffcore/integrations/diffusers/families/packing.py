"""Flux's packed latents: 2 x 2 pixels of x are one token of the transformer."""

import torch
from einops import rearrange
from torch import Tensor, nn

from diffcore.core.network import network_config
from diffcore.integrations.diffusers.families.family import Config

__all__ = ["PackedTransformer", "packed_shape"]

SIZE = 128
"""Default height and width of Flux's latents, from FluxPipeline; the network's config has none."""


class PackedTransformer(nn.Module):
    """Flux's transformer as a network of x (B, C, H, W), H and W even.

    Args:
        network: a FluxTransformer2DModel; it takes tokens (B, H/2 * W/2, 4C) and their positions.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = network_config(network)

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **condition: Tensor
    ) -> Tensor:
        """The network's output, of the shape of x.

        Args:
            x: noisy latents (B, C, H, W).
            timestep: time input (B,).
            encoder_hidden_states: text states (B, L, D).
            condition: the network's other arguments, such as `pooled_projections`.
        """
        height, width = (size // 2 for size in x.shape[-2:])
        rows, columns = (
            torch.arange(size, dtype=x.dtype, device=x.device) for size in (height, width)
        )
        ids = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        output = self.network(
            rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            img_ids=nn.functional.pad(ids.flatten(0, 1), (1, 0)),
            txt_ids=x.new_zeros(encoder_hidden_states.shape[1], 3),
            return_dict=False,
            **condition,
        )[0]
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def packed_shape(config: Config) -> tuple[int, ...]:
    """Shape (C, H, W) of one x_0, of which a token holds 2 x 2 pixels."""
    return (config["in_channels"] // 4, SIZE, SIZE)
