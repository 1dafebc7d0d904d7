"""From prompts to what a network is told: diffusers' pipeline and its text encoders do the encoding, once for each prompt.

StableDiffusion  encoder_hidden_states
XL               and added_cond_kwargs: text_embeds (pooled), time_ids (the size)
3                encoder_hidden_states, pooled_projections
Flux             and guidance, where the network is distilled from a guided one
PixArt, Sana     encoder_hidden_states, encoder_attention_mask; of PixArt's 1024 pixels added_cond_kwargs (the size)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffcore.integrations.diffusers.families import TextCondition, family_of
from diffcore.integrations.diffusers.loading.folder import network_of
from diffcore.integrations.diffusers.loading.prompts import Prompts
from diffcore.sampling.generation import evaluating

DISTILLED = 3.5
"""The strength of guidance that a distilled network is told, FluxPipeline's own."""


def encode(
    pipeline: Any,
    prompts: Sequence[str],
    negative: str = "",
    size: tuple[int, int] | None = None,
    strength: float = DISTILLED,
) -> Prompts:
    """The prompts, each encoded by itself as a call of the pipeline would, and the negative one as the null condition.

    Args:
        pipeline: of StableDiffusion (1, 2, XL, 3), Flux, PixArt or Sana, with its network, tokenizers and text encoders.
        prompts: K texts.
        negative: the text of the null condition; the empty one is what the pipeline takes for none (zeros, of most XL).
        size: height and width in pixels, which XL's networks and PixArt's of 1024 are told; the network's own by default.
        strength: of guidance, for a network that was distilled from a guided one (Flux's guidance_embeds).

    Raises:
        ValueError: a network that is told nothing or something else, or a text encoder or tokenizer missing.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts!r}, expected a list of texts, such as [{prompts!r}]")
    network = network_of(pipeline)
    family = family_of(network)
    if not family.is_text_conditioned(network):
        raise ValueError(
            f"{type(network).__name__} is not conditioned on text: leave the prompts out"
        )
    assert isinstance(family.condition, TextCondition)
    condition, encoders = family.condition, nn.ModuleList(_encoders(pipeline, family.condition))
    with torch.no_grad(), evaluating(encoders):
        rows = [condition.encode(pipeline, text, False) for text in prompts]
        rows += [condition.encode(pipeline, negative, True)]
    shared = condition.shared_arguments(network, size or _size(pipeline, network), strength)
    same = {name: value.expand(len(rows), *value.shape) for name, value in shared.items()}
    return Prompts(
        {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]} | same,
        tuple(prompts),
    )


def _encoders(pipe: Any, condition: TextCondition) -> list[nn.Module]:
    """A pipeline's text encoders, each with its tokenizer."""
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    needed = [
        part
        for name in names
        if name not in condition.optional_encoders
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    if missing := [part for part in needed if pipe.components[part] is None]:
        raise ValueError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}: load it, or pass Prompts encoded before"
        )
    return [pipe.components[name] for name in names if pipe.components[name] is not None]


def _size(pipe: Any, network: nn.Module) -> tuple[int, int]:
    shape = family_of(network).shape(network)
    if shape is None:
        raise ValueError(
            "the network's config has no sample_size: pass size, height and width in pixels"
        )
    return shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor
