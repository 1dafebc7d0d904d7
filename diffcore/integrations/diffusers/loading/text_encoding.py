"""From prompts to what a network is told: diffusers' pipeline and its text encoders do the encoding, once for each prompt.

StableDiffusion  encoder_hidden_states
XL               and added_cond_kwargs: text_embeds (pooled), time_ids (the size)
3                encoder_hidden_states, pooled_projections
Flux             and guidance, where the network is distilled from a guided one
PixArt, Sana     encoder_hidden_states, encoder_attention_mask; of PixArt's 1024 pixels added_cond_kwargs (the size)
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from diffcore.integrations.diffusers.families import config_of, shape_of, takes_text
from diffcore.integrations.diffusers.loading.folder import network_of
from diffcore.integrations.diffusers.loading.prompts import Prompts
from diffcore.sampling.generation import evaluating

DISTILLED = 3.5
"""The strength of guidance that a distilled network is told, FluxPipeline's own."""

CALLED = ("clean_caption", "complex_human_instruction", "max_sequence_length")
"""What a pipeline's call passes to encode_prompt, whose own defaults may be others."""

Rows = dict[str, Tensor]


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
    if not takes_text(network):
        raise ValueError(f"{type(network).__name__} is told no text: leave the prompts out")
    told, encoders = _told(network), nn.ModuleList(_encoders(pipeline))
    with torch.no_grad(), evaluating(encoders):
        rows = [told(pipeline, text, False) for text in prompts] + [told(pipeline, negative, True)]
    told_all = _same(network, size or _size(pipeline, network), strength)
    same = {name: value.expand(len(rows), *value.shape) for name, value in told_all.items()}
    return Prompts(
        {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]} | same,
        tuple(prompts),
    )


def _encoders(pipe: Any) -> list[nn.Module]:
    """A pipeline's text encoders, each with its tokenizer; only T5 beside two of CLIP may be missing."""
    if pipe.config.get("requires_aesthetics_score"):
        raise ValueError(
            f"this {type(pipe).__name__} is a refiner, told an aesthetic score beside the prompt: load the base"
        )
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    needed = [
        part
        for name in names
        if name != "text_encoder_3"
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    if missing := [part for part in needed if pipe.components[part] is None]:
        raise ValueError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}: load it, or pass Prompts encoded before"
        )
    return [pipe.components[name] for name in names if pipe.components[name] is not None]


def _told(network: nn.Module) -> Callable[[Any, str, bool], Rows]:
    """What encodes for a network: of a pipeline, a text, and whether it is the null condition's."""
    if isinstance(network, UNet2DConditionModel):
        return (
            _stable_diffusion_xl
            if config_of(network).get("addition_embed_type")
            else _stable_diffusion
        )
    if isinstance(network, SD3Transformer2DModel):
        return _stable_diffusion_3
    return _flux if isinstance(network, FluxTransformer2DModel) else _pixart


def _stable_diffusion(pipe: Any, text: str, null: bool) -> Rows:
    answer = pipe.encode_prompt("" if null else text, pipe._execution_device, 1, **_as(text, null))
    return {"encoder_hidden_states": answer[null]}


def _stable_diffusion_xl(pipe: Any, text: str, null: bool) -> Rows:
    answer = pipe.encode_prompt("" if null else text, **_as(text, null))
    return {
        "encoder_hidden_states": answer[0 + null],
        "added_cond_kwargs.text_embeds": answer[2 + null],
    }


def _stable_diffusion_3(pipe: Any, text: str, null: bool) -> Rows:
    answer = pipe.encode_prompt(
        "" if null else text, None, None, **_as(text, null), **_called(pipe)
    )
    return {"encoder_hidden_states": answer[0 + null], "pooled_projections": answer[2 + null]}


def _flux(pipe: Any, text: str, null: bool) -> Rows:
    """A negative prompt is encoded as any other."""
    states, pooled, _ = pipe.encode_prompt(text, **_called(pipe))
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _pixart(pipe: Any, text: str, null: bool) -> Rows:
    told = {"do_classifier_free_guidance": null, "negative_prompt": text}
    states, mask, *negative = pipe.encode_prompt("" if null else text, **told, **_called(pipe))
    states, mask = negative if null else (states, mask)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _as(text: str, null: bool) -> dict[str, Any]:
    """The negative prompt, None for the empty one, which lets the pipeline choose."""
    return {"do_classifier_free_guidance": null, "negative_prompt": text or None if null else None}


def _called(pipe: Any) -> dict[str, Any]:
    """What a call of the pipeline passes to encode_prompt unless told otherwise."""
    call, encoder = (
        inspect.signature(function).parameters for function in (pipe.__call__, pipe.encode_prompt)
    )
    return {name: call[name].default for name in CALLED if name in call and name in encoder}


def _size(pipe: Any, network: nn.Module) -> tuple[int, int]:
    shape = shape_of(network)
    if shape is None:
        raise ValueError(
            "the network's config has no sample_size: pass size, height and width in pixels"
        )
    return shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor


def _same(network: nn.Module, size: tuple[int, int], strength: float) -> Rows:
    """What is the same for every prompt, without the row."""
    config, (height, width) = config_of(network), size
    if config.get("addition_embed_type") == "text_time":
        return {
            "added_cond_kwargs.time_ids": torch.tensor(
                [height, width, 0, 0, height, width], dtype=torch.float32
            )
        }
    if getattr(network, "use_additional_conditions", False):
        resolution, ratio = (
            torch.tensor([float(height), float(width)]),
            torch.tensor([height / width]),
        )
        return {"added_cond_kwargs.resolution": resolution, "added_cond_kwargs.aspect_ratio": ratio}
    return {"guidance": torch.tensor(float(strength))} if config.get("guidance_embeds") else {}
