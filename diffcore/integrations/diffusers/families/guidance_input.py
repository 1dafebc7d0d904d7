"""Networks of diffusers that take the scale of guidance as an input (latent consistency models).

    timestep_cond = [sin(1000 ω_i (w - 1)), cos(1000 ω_i (w - 1))],   ω_i = 10000^(-i/(h-1))

for i = 0 .. h - 1, with 2h the `time_cond_proj_dim` of a UNet2DConditionModel: what the pipelines
of diffusers compute from their `guidance_scale` w (`get_guidance_scale_embedding`). Their w is that
of Ho & Salimans, 1 for the conditional model; that of Luo et al. 2023 (2310.04378) is w - 1.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.core.condition_values import GUIDANCE_SCALE
from diffcore.core.conditions import ConditionRecord
from diffcore.core.network import class_name, network_config

__all__ = ["GuidanceInput", "add_guidance_input", "guidance_conditions", "with_guidance_input"]

FEATURES = "time_cond_proj_dim"
"""Key of the config of a network: the number of features of the scale."""
DEFAULT_SCALE = 8.5
"""w of a call of LatentConsistencyModelPipeline."""
LARGEST = 100.0
"""Largest w that is accepted; a config does not contain the range of the training."""


def guidance_conditions(config: Mapping[str, Any]) -> dict[str, ConditionRecord]:
    """The named conditions of a UNet2DConditionModel.

    Args:
        config: config of the network.

    Returns:
        The scale of guidance if the network takes it as an input, with the default of diffusers.
    """
    if not config.get(FEATURES):
        return {}
    record = ConditionRecord((1,), 0.0, LARGEST, absent="null", null=(DEFAULT_SCALE,))
    return {GUIDANCE_SCALE: record}


def with_guidance_input(network: nn.Module) -> nn.Module:
    """The network with the scale as an argument, if it takes features of the scale.

    Args:
        network: a UNet2DConditionModel.

    Returns:
        The network itself if it takes none.
    """
    return GuidanceInput(network) if network_config(network).get(FEATURES) else network


class GuidanceInput(nn.Module):
    """A UNet2DConditionModel that receives the scale of guidance in place of its features.

    Args:
        network: network whose config has `time_cond_proj_dim`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config = network, network_config(network)

    def forward(
        self, x: Tensor, timestep: Tensor, guidance_scale: Tensor | None = None, **arguments: Any
    ) -> Any:
        """The network's output.

        Args:
            x: noisy samples (B, C, H, W).
            timestep: time input (B,).
            guidance_scale: w (B, 1).
            **arguments: other arguments of the network.

        Returns:
            The output of the network.

        Raises:
            ValueError: w is missing, without which the network was not trained.
        """
        if guidance_scale is None:
            raise ValueError(
                f"the {class_name(self.network)} takes the scale of guidance as an input: give the "
                f"process a condition {GUIDANCE_SCALE} of shape [1]"
            )
        features = _features(guidance_scale.flatten(1)[:, 0], self.config[FEATURES]).to(x.dtype)
        return self.network(x, timestep=timestep, timestep_cond=features, **arguments)


def _features(scale: Tensor, count: int) -> Tensor:
    """The features (B, count) of w (B,)."""
    half = count // 2
    rates = torch.arange(half, dtype=torch.float32, device=scale.device)
    rates = (-math.log(10_000) / (half - 1) * rates).exp()
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, count % 2))


def add_guidance_input(network: Any, features: int) -> None:
    """Give a network the input, of weight 0, so that it starts as the network without it.

    Args:
        network: a UNet2DConditionModel; changed in place, with its config.
        features: even number of features of w, 256 in latent consistency models.

    Raises:
        ValueError: the network has no such input, or has one already, or the number is odd.
    """
    embedding = getattr(network, "time_embedding", None)
    if FEATURES not in network_config(network) or not hasattr(embedding, "cond_proj"):
        raise ValueError(
            f"a {class_name(network)} of diffusers takes no scale of guidance as an input: leave "
            "guidance_embedding out, and distil one scale"
        )
    if network.config[FEATURES] or features % 2:
        raise ValueError(
            f"guidance_embedding is {features}, and {FEATURES} of the network is "
            f"{network.config[FEATURES]}, expected an even number for a network without one"
        )
    assert embedding is not None
    width = embedding.linear_1.in_features
    embedding.cond_proj = nn.Linear(features, width, bias=False).to(embedding.linear_1.weight)
    nn.init.zeros_(embedding.cond_proj.weight)
    network.register_to_config(**{FEATURES: features})
