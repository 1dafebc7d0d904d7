"""Names of layers in the files of adapters, in three formats.

| format | network | text encoders |
|---|---|---|
| diffusers | `unet.` or `transformer.` and the name in diffusers | `text_encoder.` |
| kohya | `lora_unet_` and a name with `_` for `.` | `lora_te_`, or `lora_te1_` .. `lora_te3_` |
| comfyui | `diffusion_model.` and the original name | `text_encoders.clip_l.transformer.` |

The name after `lora_unet_` is that of diffusers for Stable Diffusion 1 and 2, and the original one
for Stable Diffusion XL, 3 and Flux.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from diffcore.integrations.diffusers.adapters.original_names import original_layers
from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = ["Format", "Place", "known_places", "written_places"]

Format = Literal["diffusers", "kohya", "comfyui"]
Place = tuple[str, tuple[str, ...]]
"""A part of a pipeline, and the layers in it that one entry of a file changes, in order of rows."""


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
    return dict(_places(index, form))


def known_places(index: PipelineIndex) -> dict[str, Place]:
    """All names under which files of any format store the layers of a pipeline.

    Args:
        index: pipeline.

    Returns:
        Name -> part and layers.
    """
    found: dict[str, Place] = {}
    network = index.network_name
    for prefix in (f"{network}.", "lora_unet_", "lora_transformer_", "base_model.model."):
        for layer in _layers(index.read_architecture(network)):
            name = layer.replace(".", "_") if prefix.endswith("_") else layer
            found[prefix + name] = (network, (layer,))
    for part in _text_encoders(index):
        for layer in _layers(index.read_architecture(part)):
            found[f"{part}.{layer}"] = (part, (layer,))
    for form in ("diffusers", "kohya", "comfyui"):
        try:
            found |= dict(_places(index, form))
        except ValueError:  # a network whose original names are unknown
            continue
    return found


def _places(index: PipelineIndex, form: Format) -> Iterator[tuple[str, Place]]:
    network = index.read_architecture(index.network_name)
    yield from _network_places(index, network, form)
    for part in _text_encoders(index):
        encoder = index.read_architecture(part)
        prefix = {
            "diffusers": f"{part}.",
            "kohya": _kohya_prefix(index, part, encoder),
            "comfyui": f"text_encoders.{_comfyui_name(part, encoder)}.transformer.",
        }[form]
        for layer in _layers(encoder):
            name = _in_files(encoder, layer)
            name = name.replace(".", "_") if form == "kohya" else name
            yield prefix + name, (part, (layer,))


def _network_places(
    index: PipelineIndex, network: nn.Module, form: Format
) -> Iterator[tuple[str, Place]]:
    part = index.network_name
    is_latent_diffusion = type(network).__name__ == "UNet2DConditionModel" and not _is_xl(network)
    if form == "diffusers":
        yield from ((f"{part}.{layer}", (part, (layer,))) for layer in _layers(network))
    elif form == "kohya" and is_latent_diffusion:
        for layer in _layers(network):
            yield f"lora_unet_{layer.replace('.', '_')}", (part, (layer,))
    else:
        for name, layers in original_layers(network).items():
            kohya = f"lora_unet_{name.replace('.', '_')}"
            yield kohya if form == "kohya" else f"diffusion_model.{name}", (part, layers)


def _is_xl(network: Any) -> bool:
    return getattr(network.config, "addition_embed_type", None) == "text_time"


def _layers(model: nn.Module) -> list[str]:
    """Names of the linear and convolutional layers."""
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _text_encoders(index: PipelineIndex) -> list[str]:
    return sorted(name for name in index.parts if name.startswith("text_encoder"))


def _in_files(encoder: nn.Module, layer: str) -> str:
    """The name of a text encoder's layer in files: transformers 5 dropped CLIP's `text_model.`."""
    is_short = type(encoder).__name__ == "CLIPTextModel" and not hasattr(encoder, "text_model")
    return f"text_model.{layer}" if is_short else layer


def _is_t5(encoder: nn.Module) -> bool:
    return type(encoder).__name__.startswith("T5")


def _kohya_prefix(index: PipelineIndex, part: str, encoder: nn.Module) -> str:
    if _is_t5(encoder):
        return "lora_te3_"
    if len(_text_encoders(index)) == 1:
        return "lora_te_"
    return "lora_te2_" if part == "text_encoder_2" else "lora_te1_"


def _comfyui_name(part: str, encoder: Any) -> str:
    if _is_t5(encoder):
        return "t5xxl"
    if part == "text_encoder_2":
        return "clip_g"
    return "clip_h" if encoder.config.hidden_size == 1024 else "clip_l"
