"""What a network of diffusers takes beside x and its level, and in which units: read from its class and its config."""

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from einops import rearrange
from torch import Tensor, nn

TOLD_TEXT = (
    UNet2DConditionModel,
    SD3Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
)
OF_A_FLOW = (SD3Transformer2DModel, FluxTransformer2DModel, SanaTransformer2DModel)
DIT_NULL = 1000
"""DiTPipeline's null label."""
FLUX_SIZE = 128
"""Of Flux's latents, FluxPipeline's own: its network knows none."""


def takes_text(network: nn.Module) -> bool:
    """Whether a network is told text, in one of the ways that are known here.

    Raises:
        ValueError: in another way.
    """
    config = config_of(network)
    if not isinstance(network, TOLD_TEXT):
        if isinstance(network, DiTTransformer2DModel):
            return False
        if (
            config.get("encoder_hid_dim")
            or config.get("cross_attention_dim")
            or config.get("joint_attention_dim")
        ):
            raise _other(network, "takes a condition that is not known here")
        return False
    for name, known in (
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim_type", None),
        ("class_embed_type", None),
    ):
        if (value := config.get(name)) not in (None, known):
            raise _other(network, f"has {name} {value!r}")
    if config.get("time_cond_proj_dim"):
        raise _other(
            network, "is told a strength of guidance beside its level (time_cond_proj_dim)"
        )
    given, answered = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if answered not in (given, 2 * given):
        raise _other(
            network, f"takes {given} channels and answers {answered}: it is told an image beside x"
        )
    return True


def _other(network: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{type(network).__name__} {why}: guide it in its pipeline (attach, or a DiffcoreScheduler)"
    )


def config_of(network: nn.Module) -> Any:
    """A network's config, empty where it has none."""
    return getattr(network, "config", None) or {}


def shape_of(network: nn.Module) -> tuple[int, ...] | None:
    """Of one x, where the network says it."""
    config = config_of(network)
    if isinstance(network, FluxTransformer2DModel):
        return (config["in_channels"] // 4, FLUX_SIZE, FLUX_SIZE)
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        return None
    return (channels, *((size, size) if isinstance(size, int) else size))


def tokens(network: nn.Module, shape: tuple[int, ...]) -> int | None:
    """How many a transformer makes of x, where it does: from these its pipeline computes the shift's μ."""
    patch = (
        2 if isinstance(network, FluxTransformer2DModel) else config_of(network).get("patch_size")
    )
    return (shape[-2] // patch) * (shape[-1] // patch) if patch else None


def time_factor(network: nn.Module) -> float:
    """What a pipeline multiplies a timestep by before the network is told."""
    if isinstance(network, FluxTransformer2DModel):
        return 1 / 1000
    return float(config_of(network).get("timestep_scale", 1.0))


class Packed(nn.Module):
    """Flux's transformer, asked about x (B, C, H, W): 2 x 2 pixels of it are one token (H, W even).

    Args:
        network: a FluxTransformer2DModel.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.config = config_of(network)

    def forward(
        self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **told: Tensor
    ) -> Tensor:
        """The network's answer, of the shape of x."""
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
            **told,
        )[0]
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)
