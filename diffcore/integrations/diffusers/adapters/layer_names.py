"""Names of layers in the files of adapters, in three formats.

| format | network | text encoders |
|---|---|---|
| diffusers | `unet.` or `transformer.` and the name in diffusers | `text_encoder.` |
| kohya | `lora_unet_` and a name with `_` for `.` | `lora_te_`, or `lora_te1_` .. `lora_te3_` |
| comfyui | `diffusion_model.` and the original name | `text_encoders.clip_l.transformer.` |

The name after `lora_unet_` is that of diffusers for Stable Diffusion 1 and 2, and the original one
for Stable Diffusion XL, 3 and Flux.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from diffcore.integrations.diffusers.adapters.original_names import original_layers
from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = [
    "Format",
    "Place",
    "exact_pattern",
    "find_pattern",
    "is_named",
    "known_places",
    "name_in_files",
    "written_places",
]

Format = Literal["diffusers", "kohya", "comfyui"]
Models = dict[str, nn.Module]
"""The network of a pipeline, then its text encoders, without weights, by their parts."""


class Place(NamedTuple):
    """What one entry of a file changes.

    Args:
        part: part of a pipeline, such as unet.
        layers: layers of this part, in the order of their rows in the entry.
        rows: number of rows of each layer.
    """

    part: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]


def written_places(index: PipelineIndex, form: Format) -> dict[str, Place]:
    """The names with which a format stores the layers of a pipeline.

    Args:
        index: pipeline.
        form: format.

    Returns:
        Name -> part and layers.

    Raises:
        ValueError: the format has no names for the network.
    """
    return dict(_places(_models(index), form))


def known_places(index: PipelineIndex) -> dict[str, Place]:
    """All names under which files of any format store the layers of a pipeline.

    Args:
        index: pipeline.

    Returns:
        Name -> part and layers.
    """
    models, found = _models(index), dict[str, Place]()
    for prefix in ("lora_unet_", "lora_transformer_", "base_model.model."):
        for layer in _layers(models[index.network_name]):
            name = layer.replace(".", "_") if prefix.endswith("_") else layer
            found[prefix + name] = _place(models, index.network_name, layer)
    for part, model in models.items():
        found |= {f"{part}.{layer}": _place(models, part, layer) for layer in _layers(model)}
    for form in get_args(Format):
        try:
            found |= dict(_places(models, form))
        except ValueError:  # a network whose original names are unknown
            continue
    return found


def is_named(layer: str, target: str) -> bool:
    """Whether the name of a layer ends in a target, which consists of whole words between dots.

    Args:
        layer: name of the layer, such as mid_block.attn.to_out.0.
        target: end of a name, such as to_out.0.

    Returns:
        True if it does.
    """
    return f".{layer}".endswith(f".{target}")


def find_pattern(patterns: Iterable[str], layer: str) -> str | None:
    """The pattern of peft's `rank_pattern` or `alpha_pattern` that counts for a layer.

    It is the first one, in the order given, that matches the name of the layer as a regular
    expression: the whole name, or its end from a dot on.

    Args:
        patterns: regular expressions, such as `mid_block.*to_q`.
        layer: name of the layer, such as mid_block.attn.to_q.

    Returns:
        The pattern, or None if none matches.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return pattern
        except re.error as error:
            raise ValueError(
                f"the pattern {pattern!r} is no regular expression ({error}): expected one for "
                "names of layers, such as mid_block.*to_q; correct the ranks of LoRA, or the "
                "rank_pattern or alpha_pattern in the metadata of the adapter's file"
            ) from None
    return None


def exact_pattern(layer: str, layers: Iterable[str]) -> str:
    """The pattern that matches one layer alone, whatever the order of the patterns.

    Args:
        layer: name of the layer, such as proj_out.
        layers: names of all adapted layers, such as proj_out and blocks.0.proj_out.

    Returns:
        The name of the layer; bound to the start of the names if another name ends in it.
    """
    is_end = any(other.endswith(f".{layer}") for other in layers)
    return f"^{layer}" if is_end else layer


def _models(index: PipelineIndex) -> Models:
    names = (index.network_name, *index.text_encoders)
    return {name: index.read_architecture(name) for name in names}


def _place(models: Models, part: str, *layers: str) -> Place:
    weights: list[Any] = [models[part].get_submodule(layer).weight for layer in layers]
    return Place(part, layers, tuple(map(len, weights)))


def _places(models: Models, form: Format) -> Iterator[tuple[str, Place]]:
    network, *encoders = models
    for name, layers in _network_names(network, models[network], form):
        yield name, _place(models, network, *layers)
    for part in encoders:
        encoder = models[part]
        prefix = {
            "diffusers": f"{part}.",
            "kohya": _kohya_prefix(part, encoder, len(encoders)),
            "comfyui": f"text_encoders.{_comfyui_name(part, encoder)}.transformer.",
        }[form]
        for layer in _layers(encoder):
            name = name_in_files(encoder, layer)
            name = name.replace(".", "_") if form == "kohya" else name
            yield prefix + name, _place(models, part, layer)


def _network_names(
    part: str, network: nn.Module, form: Format
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of a network's layers in a format, and the layers of each."""
    is_latent_diffusion = type(network).__name__ == "UNet2DConditionModel" and not _is_xl(network)
    if form == "diffusers":
        yield from ((f"{part}.{layer}", (layer,)) for layer in _layers(network))
    elif form == "kohya" and is_latent_diffusion:
        for layer in _layers(network):
            yield f"lora_unet_{layer.replace('.', '_')}", (layer,)
    else:
        for name, layers in original_layers(network).items():
            kohya = f"lora_unet_{name.replace('.', '_')}"
            yield kohya if form == "kohya" else f"diffusion_model.{name}", layers


def _is_xl(network: Any) -> bool:
    return getattr(network.config, "addition_embed_type", None) == "text_time"


def _layers(model: nn.Module) -> list[str]:
    """Names of the linear and convolutional layers."""
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def name_in_files(encoder: nn.Module, layer: str) -> str:
    """The name of a text encoder's layer in files: transformers 5 dropped CLIP's `text_model.`.

    Args:
        encoder: text encoder.
        layer: name of the layer, or of one of its tensors, in the encoder.

    Returns:
        The name with which files of adapters begin.
    """
    is_short = type(encoder).__name__ == "CLIPTextModel" and not hasattr(encoder, "text_model")
    return f"text_model.{layer}" if is_short else layer


def _is_t5(encoder: nn.Module) -> bool:
    return type(encoder).__name__.startswith("T5")


def _kohya_prefix(part: str, encoder: nn.Module, encoders: int) -> str:
    if _is_t5(encoder):
        return "lora_te3_"
    if encoders == 1:
        return "lora_te_"
    return "lora_te2_" if part == "text_encoder_2" else "lora_te1_"


def _comfyui_name(part: str, encoder: Any) -> str:
    if _is_t5(encoder):
        return "t5xxl"
    if part == "text_encoder_2":
        return "clip_g"
    return "clip_h" if encoder.config.hidden_size == 1024 else "clip_l"
