"""How each family maps its pipeline's encoded prompts to the arguments of its network."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffcore.core.network import network_config, unwrap
from diffcore.integrations.diffusers.families.family import TextCondition

__all__ = [
    "FluxText",
    "MaskedText",
    "PixArtText",
    "StableDiffusion3Text",
    "StableDiffusionText",
    "StableDiffusionXLText",
]

CALL_DEFAULTS = ("clean_caption", "complex_human_instruction", "max_sequence_length")
"""Options for which a pipeline's call and its `encode_prompt` may have different defaults."""

Arguments = dict[str, Tensor]


class StableDiffusionText(TextCondition):
    """The states of CLIP."""

    summary = "text: the states of CLIP"

    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    unsupported_config = {  # noqa: RUF012  # constant
        "encoder_hid_dim_type": "its text states are projected together with another condition",
        "num_class_embeds": "it is conditioned on a class label beside the text",
        "class_embed_type": "it is conditioned on an embedding beside the text",
    }

    def encode(self, pipeline: Any, text: str, is_null: bool) -> Arguments:
        encoded = pipeline.encode_prompt(
            device=pipeline._execution_device, num_images_per_prompt=1, **_prompts(text, is_null)
        )
        return {"encoder_hidden_states": encoded[is_null]}

    def encode_tokens(
        self,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tensor],
        frozen: Tensor | None = None,
    ) -> Arguments:
        (encoder,), (ids,) = encoders, tokens
        return {"encoder_hidden_states": encoder(ids)[0]}


class StableDiffusionXLText(StableDiffusionText):
    """The states of two encoders, a pooled one, and the size in pixels as `time_ids`."""

    summary = "text: the states of two CLIP encoders, a pooled one, and sizes and crop as time_ids"

    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    def check_pipeline(self, pipeline: Any) -> None:
        if pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(
                f"this {type(pipeline).__name__} is a refiner, conditioned on an aesthetic score "
                f"beside the prompt: load the base"
            )

    def encode(self, pipeline: Any, text: str, is_null: bool) -> Arguments:
        encoded = pipeline.encode_prompt(**_prompts(text, is_null))
        return {
            "encoder_hidden_states": encoded[0 + is_null],
            "added_cond_kwargs.text_embeds": encoded[2 + is_null],
        }

    def encode_tokens(
        self,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tensor],
        frozen: Tensor | None = None,
    ) -> Arguments:
        outputs = _outputs(encoders, tokens)
        return {
            "encoder_hidden_states": torch.cat([out.hidden_states[-2] for out in outputs], -1),
            "added_cond_kwargs.text_embeds": outputs[-1].text_embeds,
        }

    def unread_layers(self, name: str, encoder: nn.Module) -> tuple[str, ...]:
        # The states are those before the last layer, which only the pooled one of the second needs.
        if name != "text_encoder":
            return ()
        config: Any = encoder.config
        return (f"encoder.layers.{config.num_hidden_layers - 1}",)

    def size_arguments(self, network: nn.Module, sizes: Tensor) -> Arguments:
        return {"added_cond_kwargs.time_ids": sizes}


class StableDiffusion3Text(TextCondition):
    """The states of three encoders, of which T5 may be missing, and two pooled ones."""

    summary = "text: the states of two CLIP encoders and of T5, and two pooled ones"

    optional_encoders = ("text_encoder_3",)
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    has_frozen_encoders = True

    def encode(self, pipeline: Any, text: str, is_null: bool) -> Arguments:
        encoded = pipeline.encode_prompt(
            prompt_2=None, prompt_3=None, **_prompts(text, is_null), **_call_defaults(pipeline)
        )
        return {
            "encoder_hidden_states": encoded[0 + is_null],
            "pooled_projections": encoded[2 + is_null],
        }

    def frozen_states(self, pipeline: Any, encoded: Mapping[str, Tensor]) -> Tensor:
        # The states of T5, or zeros without it, follow those of CLIP.
        return encoded["encoder_hidden_states"][:, pipeline.tokenizer_max_length :]

    def encode_tokens(
        self,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tensor],
        frozen: Tensor | None = None,
    ) -> Arguments:
        assert frozen is not None
        outputs = _outputs(encoders, tokens)
        states = torch.cat([out.hidden_states[-2] for out in outputs], -1)
        states = nn.functional.pad(states, (0, frozen.shape[-1] - states.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat((states, frozen.to(states)), -2),
            "pooled_projections": torch.cat([out.text_embeds for out in outputs], -1),
        }


class FluxText(TextCondition):
    """The states of T5, CLIP's pooled one, and the scale that a guidance-distilled network takes.

    A negative prompt is encoded as any other.
    """

    summary = "text: the states of T5, CLIP's pooled one, and the guidance scale if it takes one"

    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    has_frozen_encoders = True

    def encode(self, pipeline: Any, text: str, is_null: bool) -> Arguments:
        states, pooled, _ = pipeline.encode_prompt(text, **_call_defaults(pipeline))
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def frozen_states(self, pipeline: Any, encoded: Mapping[str, Tensor]) -> Tensor:
        return encoded["encoder_hidden_states"]

    def encode_tokens(
        self,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tensor],
        frozen: Tensor | None = None,
    ) -> Arguments:
        assert frozen is not None
        (encoder,), (ids,) = encoders, tokens
        return {"encoder_hidden_states": frozen, "pooled_projections": encoder(ids).pooler_output}

    def shared_arguments(
        self, network: nn.Module, size: tuple[int, int], guidance_scale: float
    ) -> Arguments:
        if not network_config(network).get("guidance_embeds"):
            return {}
        return {"guidance": torch.tensor(float(guidance_scale))}


class MaskedText(TextCondition):
    """The states of one encoder, and their mask."""

    summary = "text: the states of one encoder, and their mask"

    def encode(self, pipeline: Any, text: str, is_null: bool) -> Arguments:
        prompts = _prompts(text, is_null) | {"negative_prompt": text}
        states, mask, *negative = pipeline.encode_prompt(**prompts, **_call_defaults(pipeline))
        states, mask = negative if is_null else (states, mask)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


class PixArtText(MaskedText):
    """The states of T5 and their mask, and in networks of 1024 pixels the size."""

    summary = "text: the states of T5 and their mask, and the size if it takes one"

    def size_arguments(self, network: nn.Module, sizes: Tensor) -> Arguments:
        if not getattr(unwrap(network), "use_additional_conditions", False):
            return {}
        target = sizes[:, 4:]  # the size of the result, as in a call of the pipeline
        return {
            "added_cond_kwargs.resolution": target,
            "added_cond_kwargs.aspect_ratio": target[:, :1] / target[:, 1:],
        }


def _outputs(encoders: Sequence[nn.Module], tokens: Sequence[Tensor]) -> list[Any]:
    """The outputs of text encoders with the states of all layers."""
    return [
        encoder(ids, output_hidden_states=True)
        for encoder, ids in zip(encoders, tokens, strict=True)
    ]


def _prompts(text: str, is_null: bool) -> dict[str, Any]:
    """The prompt, or for the null label the negative prompt beside an empty prompt.

    An empty negative prompt is None, for which the pipeline chooses text or zeros.
    """
    return {
        "prompt": "" if is_null else text,
        "do_classifier_free_guidance": is_null,
        "negative_prompt": text or None if is_null else None,
    }


def _call_defaults(pipeline: Any) -> dict[str, Any]:
    """The options that a call of the pipeline passes to `encode_prompt` by default."""
    call, encoder = (
        inspect.signature(function).parameters
        for function in (pipeline.__call__, pipeline.encode_prompt)
    )
    return {name: call[name].default for name in CALL_DEFAULTS if name in call and name in encoder}
