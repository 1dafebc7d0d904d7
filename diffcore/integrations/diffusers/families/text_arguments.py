"""The text arguments of each family's network, as its pipeline's `encode_prompt` makes them.

Every encoder is a function (pipeline, text, is_null) -> arguments of the network's forward, each of
shape (1, ...); see `TextCondition`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.integrations.diffusers.families.family import network_config

__all__ = [
    "flux_text",
    "guidance_argument",
    "masked_text",
    "no_arguments",
    "size_arguments",
    "stable_diffusion_3_text",
    "stable_diffusion_text",
    "stable_diffusion_xl_text",
    "stable_diffusion_xl_time_ids",
]

CALL_DEFAULTS = ("clean_caption", "complex_human_instruction", "max_sequence_length")
"""Options for which a pipeline's call and its `encode_prompt` may have different defaults."""

Arguments = dict[str, Tensor]


def stable_diffusion_text(pipe: Any, text: str, is_null: bool) -> Arguments:
    """CLIP's states; `encode_prompt` returns (prompt, negative prompt)."""
    encoded = pipe.encode_prompt(
        "" if is_null else text, pipe._execution_device, 1, **_negative(text, is_null)
    )
    return {"encoder_hidden_states": encoded[is_null]}


def stable_diffusion_xl_text(pipe: Any, text: str, is_null: bool) -> Arguments:
    """The states of two encoders and a pooled one.

    Raises:
        ValueError: the pipeline is a refiner.
    """
    if pipe.config.get("requires_aesthetics_score"):
        raise ValueError(
            f"this {type(pipe).__name__} is a refiner, conditioned on an aesthetic score beside the "
            f"prompt: load the base"
        )
    encoded = pipe.encode_prompt("" if is_null else text, **_negative(text, is_null))
    return {
        "encoder_hidden_states": encoded[0 + is_null],
        "added_cond_kwargs.text_embeds": encoded[2 + is_null],
    }


def stable_diffusion_3_text(pipe: Any, text: str, is_null: bool) -> Arguments:
    """The states of three encoders and two pooled ones."""
    encoded = pipe.encode_prompt(
        "" if is_null else text, None, None, **_negative(text, is_null), **_call_defaults(pipe)
    )
    return {
        "encoder_hidden_states": encoded[0 + is_null],
        "pooled_projections": encoded[2 + is_null],
    }


def flux_text(pipe: Any, text: str, is_null: bool) -> Arguments:
    """T5's states and CLIP's pooled one; a negative prompt is encoded as any other."""
    states, pooled, _ = pipe.encode_prompt(text, **_call_defaults(pipe))
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def masked_text(pipe: Any, text: str, is_null: bool) -> Arguments:
    """States and their mask (PixArt, Sana)."""
    states, mask, *negative = pipe.encode_prompt(
        "" if is_null else text,
        do_classifier_free_guidance=is_null,
        negative_prompt=text,
        **_call_defaults(pipe),
    )
    states, mask = negative if is_null else (states, mask)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _negative(text: str, is_null: bool) -> dict[str, Any]:
    """The negative prompt; None for the empty one, for which the pipeline chooses text or zeros."""
    return {
        "do_classifier_free_guidance": is_null,
        "negative_prompt": text or None if is_null else None,
    }


def _call_defaults(pipe: Any) -> dict[str, Any]:
    """What a call of the pipeline passes to `encode_prompt` by default."""
    call, encoder = (
        inspect.signature(function).parameters for function in (pipe.__call__, pipe.encode_prompt)
    )
    return {name: call[name].default for name in CALL_DEFAULTS if name in call and name in encoder}


def no_arguments(network: nn.Module, size: tuple[int, int], guidance_scale: float) -> Arguments:
    """No arguments are shared by all prompts."""
    return {}


def stable_diffusion_xl_time_ids(
    network: nn.Module, size: tuple[int, int], guidance_scale: float
) -> Arguments:
    """Original size, crop and target size in pixels, as `added_cond_kwargs.time_ids` (6,)."""
    height, width = size
    time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
    return {"added_cond_kwargs.time_ids": time_ids}


def size_arguments(network: nn.Module, size: tuple[int, int], guidance_scale: float) -> Arguments:
    """The size in pixels, for PixArt's networks of 1024 pixels."""
    if not getattr(network, "use_additional_conditions", False):
        return {}
    height, width = size
    return {
        "added_cond_kwargs.resolution": torch.tensor([float(height), float(width)]),
        "added_cond_kwargs.aspect_ratio": torch.tensor([height / width]),
    }


def guidance_argument(
    network: nn.Module, size: tuple[int, int], guidance_scale: float
) -> Arguments:
    """The guidance scale as an input, for Flux's guidance-distilled networks."""
    if not network_config(network).get("guidance_embeds"):
        return {}
    return {"guidance": torch.tensor(float(guidance_scale))}
