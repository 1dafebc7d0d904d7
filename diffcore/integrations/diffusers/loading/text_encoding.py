"""From prompts to the arguments of a text-conditioned network.

The pipeline and its text encoders encode each prompt once; the record of its family
(`integrations/diffusers/families`) maps what they return to the network's arguments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffcore.core.network import class_name
from diffcore.integrations.diffusers.families import TextCondition, family_of
from diffcore.integrations.diffusers.loading.folder import network_of
from diffcore.integrations.diffusers.loading.prompts import Prompts
from diffcore.sampling.generation import evaluation_mode

__all__ = ["EMBEDDED_GUIDANCE_SCALE", "encode_prompts"]

EMBEDDED_GUIDANCE_SCALE = 3.5
"""Default of the guidance scale that a distilled network takes as an input, from FluxPipeline."""


def encode_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    negative: str = "",
    size: tuple[int, int] | None = None,
    guidance_scale: float = EMBEDDED_GUIDANCE_SCALE,
) -> Prompts:
    """The prompts, each encoded alone as in a call of the pipeline, and the null condition.

    Args:
        pipeline: pipeline of a text-conditioned family (`families.FAMILIES`) with its network,
            tokenizers and text encoders.
        prompts: K texts.
        negative: text of the null condition; "" is what the pipeline uses without a negative
            prompt (zeros for many XL pipelines).
        size: height and width in pixels, for networks that are conditioned on it (XL, PixArt of
            1024 pixels); default: the network's own.
        guidance_scale: input of a guidance-distilled network (Flux with `guidance_embeds`).

    Returns:
        A bank of K + 1 entries.

    Raises:
        ValueError: the network is not conditioned on text alone, or a text encoder or tokenizer is
            missing.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts!r}, expected a list of texts, such as [{prompts!r}]")
    network = network_of(pipeline)
    family = family_of(network)
    if not family.is_text_conditioned(network):
        raise ValueError(f"{class_name(network)} is not conditioned on text: leave the prompts out")
    condition = family.condition
    assert isinstance(condition, TextCondition)
    with torch.no_grad(), evaluation_mode(nn.ModuleList(_text_encoders(pipeline, condition))):
        encoded = [condition.encode(pipeline, text, False) for text in prompts]
        encoded += [condition.encode(pipeline, negative, True)]
    size = size or _network_size(pipeline, network)
    shared = condition.shared_arguments(network, size, guidance_scale)
    expanded = {name: value.expand(len(encoded), *value.shape) for name, value in shared.items()}
    return Prompts(
        {name: torch.cat([entry[name] for entry in encoded]).cpu() for name in encoded[0]}
        | expanded,
        tuple(prompts),
    )


def _text_encoders(pipe: Any, condition: TextCondition) -> list[nn.Module]:
    """A pipeline's text encoders.

    Raises:
        ValueError: one that is not optional, or its tokenizer, is missing.
    """
    condition.check_pipeline(pipe)
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    needed = [
        part
        for name in names
        if name not in condition.optional_encoders
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    if missing := [part for part in needed if pipe.components[part] is None]:
        raise ValueError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}: load it, or pass "
            f"Prompts encoded before"
        )
    return [pipe.components[name] for name in names if pipe.components[name] is not None]


def _network_size(pipe: Any, network: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the network's sample size."""
    shape = family_of(network).shape(network)
    if shape is None:
        raise ValueError(
            "the network's config has no sample_size: pass size, height and width in pixels"
        )
    return shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor
