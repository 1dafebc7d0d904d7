"""The model families of diffusers that diffcore knows: one record each.

A new family is one record in `FAMILIES` (CONTRIBUTING.md, "Supporting a new diffusers family"), or
`register_family(record)` in the code of a user.
"""

import inspect
from typing import Any

from torch import nn

from diffcore.core.network import ExportableNetwork, network_config, unwrap
from diffcore.integrations.diffusers.families.class_labels import (
    DIT_NULL_LABEL,
    check_label_embedding,
    dit_class_count,
)
from diffcore.integrations.diffusers.families.export_targets import (
    batch_call,
    dit_call,
    dit_pipeline,
    unet_pipeline,
)
from diffcore.integrations.diffusers.families.family import (
    ClassCondition,
    ExportTarget,
    ModelFamily,
)
from diffcore.integrations.diffusers.families.guidance_input import (
    guidance_conditions,
    with_guidance_input,
)
from diffcore.integrations.diffusers.families.packing import PackedTransformer, packed_shape
from diffcore.integrations.diffusers.families.text_conditions import (
    FluxText,
    MaskedText,
    PixArtText,
    StableDiffusion3Text,
    StableDiffusionText,
    StableDiffusionXLText,
)

__all__ = [
    "FAMILIES",
    "GENERIC",
    "family_of",
    "family_of_class",
    "family_of_pipeline",
    "register_family",
]

FAMILIES = [
    ModelFamily(
        "UNet2DModel",
        network="UNet2DModel",
        condition=ClassCondition(check_label_embedding),
        export_target=ExportTarget(unet_pipeline, batch_call),
    ),
    ModelFamily(
        "DiT",
        network="DiTTransformer2DModel",
        pipelines=("DiTPipeline",),
        guidance_batching="condition first",
        condition=ClassCondition(dit_class_count, null_label=DIT_NULL_LABEL),
        export_target=ExportTarget(dit_pipeline, dit_call),
        recipes=("finetune-classes",),
    ),
    ModelFamily(
        "Stable Diffusion 1 and 2",
        network="UNet2DConditionModel",
        config={"addition_embed_type": None},
        pipelines=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        ),
        condition=StableDiffusionText(),
        wrap=with_guidance_input,
        named_conditions=guidance_conditions,
        recipes=("finetune-sd", "finetune-text-to-image"),
    ),
    ModelFamily(
        "Stable Diffusion XL",
        network="UNet2DConditionModel",
        config={"addition_embed_type": "text_time"},
        pipelines=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
        ),
        condition=StableDiffusionXLText(),
        wrap=with_guidance_input,
        named_conditions=guidance_conditions,
        recipes=("finetune-sdxl", "finetune-text-to-image"),
    ),
    ModelFamily(
        "Stable Diffusion 3",
        network="SD3Transformer2DModel",
        pipelines=(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        ),
        condition=StableDiffusion3Text(),
        prediction="flow_prediction",
        recipes=("finetune-sd3", "finetune-flow"),
    ),
    ModelFamily(
        "Flux",
        network="FluxTransformer2DModel",
        pipelines=(
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxControlNetPipeline",
        ),
        guidance_batching="separate calls",
        guidance_argument="true_cfg_scale",
        condition=FluxText(),
        dropout=0.0,
        prediction="flow_prediction",
        time_factor=1 / 1000,
        patch_size=2,
        sample_shape=packed_shape,
        wrap=PackedTransformer,
        recipes=("finetune-flux", "finetune-flow"),
    ),
    ModelFamily(
        "PixArt",
        network="PixArtTransformer2DModel",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        condition=PixArtText(),
        recipes=("finetune-sd", "finetune-text-to-image"),
    ),
    ModelFamily(
        "Sana",
        network="SanaTransformer2DModel",
        pipelines=("SanaPipeline", "SanaControlNetPipeline"),
        condition=MaskedText(),
        prediction="flow_prediction",
        time_factor="timestep_scale",
        recipes=("finetune-flow",),
    ),
]
"""Every known family. Records of one network class differ in `config`."""

GENERIC = ModelFamily("generic", network="Module", time_factor="timestep_scale")
"""Any network that is called as network(x, timestep), with or without `class_labels`. It is the
record of a network whose class has none, unless its config has a text condition."""

_TEXT_CONFIG = (
    "encoder_hid_dim",
    "cross_attention_dim",
    "joint_attention_dim",
    "text_dim",
    "text_embed_dim",
    "cap_feat_dim",
    "caption_channels",
)
"""Keys of a config that give the width of text states, in networks whose text is optional too."""


def register_family(family: ModelFamily) -> None:
    """Add a family at run time, for a network that diffcore has no record of.

    Args:
        family: the record.

    Raises:
        ValueError: a family has this name already.
    """
    if family.name in (known.name for known in FAMILIES):
        raise ValueError(f"a family named {family.name!r} is known already: give another name")
    FAMILIES.append(family)


def family_of(network: nn.Module) -> ModelFamily:
    """The record of a network's family.

    Args:
        network: a network of diffusers, or any module, which may be wrapped (`unwrap`).

    Returns:
        The record of its class, selected by its config; `GENERIC` for a class without a
        record that takes no text and no other argument than x, the time and a class label.

    Raises:
        ValueError: the network is conditioned in a way that no record describes.
    """
    network = unwrap(network)
    if isinstance(network, ExportableNetwork):
        network = network.described_network
    config = network_config(network)
    candidates = _by_network([cls.__name__ for cls in type(network).__mro__])
    for family in candidates:
        if all(config.get(key) == value for key, value in family.config.items()):
            return family
    if candidates:
        keys = sorted({key for family in candidates for key in family.config})
        given = ", ".join(f"{key} {config.get(key)!r}" for key in keys)
        raise _unknown(f"{type(network).__name__} with {given}")
    condition = [key for key in _TEXT_CONFIG if config.get(key)] or _other_arguments(network)
    if condition:
        raise _unknown(f"{type(network).__name__}, conditioned by {', '.join(condition)}")
    return GENERIC


def _other_arguments(network: nn.Module) -> list[str]:
    """The arguments that a network of diffusers requires beside x, the time and a class label."""
    if not network_config(network):
        return []  # a network of the user's, whose arguments may have any name
    return [
        p.name
        for p in list(inspect.signature(type(network).forward).parameters.values())[2:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.default is p.empty
        and p.name not in ("timestep", "time", "t", "class_labels")
    ]


def family_of_class(name: str) -> ModelFamily | None:
    """The first record of a network class.

    Args:
        name: name of the class, such as "UNet2DConditionModel".

    Returns:
        The record, or None if no record names the class.
    """
    return next(iter(_by_network([name])), None)


def family_of_pipeline(pipeline: Any) -> ModelFamily:
    """The record of the family whose guidance `attach` replaces in a pipeline.

    Args:
        pipeline: a pipeline of diffusers.

    Returns:
        The record that names the pipeline's class, or one of its base classes.

    Raises:
        ValueError: no record names it.
    """
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    for name in names:
        for family in FAMILIES:
            if name in family.pipelines:
                return family
    known = ", ".join(family.name for family in FAMILIES if family.pipelines)
    raise ValueError(
        f"{names[0]} is in no record of a model family, expected a pipeline of {known} "
        f"(diffcore.integrations.diffusers.families.FAMILIES lists their classes). Give it a "
        f"DiffcoreScheduler, which any pipeline accepts, and use its own guidance scale; or add a "
        f"record (CONTRIBUTING.md, 'Supporting a new diffusers family')"
    )


def _by_network(names: list[str]) -> list[ModelFamily]:
    """The records of the first of these classes that has one."""
    for name in names:
        if records := [family for family in FAMILIES if family.network == name]:
            return records
    return []


def _unknown(network: str) -> ValueError:
    known = ", ".join(dict.fromkeys(family.network for family in FAMILIES))
    return ValueError(
        f"no record of a model family describes a {network}; known are {known}. Guide it in its "
        f"pipeline (a DiffcoreScheduler, or a DiffcoreGuider), or add a record (CONTRIBUTING.md, "
        f"'Supporting a new diffusers family')"
    )
