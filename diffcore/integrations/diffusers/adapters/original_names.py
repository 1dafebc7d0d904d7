"""Names of a network's layers in the code that it was published with, which kohya and ComfyUI use.

A layer there may be several layers of diffusers: `attn.qkv` is to_q, to_k and to_v, whose weights
are its rows in this order.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["original_layers"]

Layers = dict[str, tuple[str, ...]]
"""Name of an original layer -> the layers of diffusers of which it consists, in order."""

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FLUX_DOUBLE = {
    "img_attn.qkv": QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
SD3_BLOCK = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ADDED_QKV,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def original_layers(network: nn.Module) -> Layers:
    """The layers of a network by their original names.

    Left out are layers whose weight the original code stores in another order: the modulation of
    the last block.

    Args:
        network: UNet2DConditionModel, FluxTransformer2DModel or SD3Transformer2DModel, possibly
            without weights.

    Returns:
        Original name -> names in diffusers.

    Raises:
        ValueError: the network is another one.
    """
    rules = {
        "UNet2DConditionModel": _unet,
        "FluxTransformer2DModel": _flux,
        "SD3Transformer2DModel": _sd3,
    }
    kind = type(network).__name__
    if kind not in rules:
        raise ValueError(
            f"the layers of {kind} have no names in the formats of kohya and ComfyUI here, "
            f"expected {', '.join(rules)}: use the format diffusers"
        )
    names = [name for name, module in network.named_modules() if hasattr(module, "weight")]
    return dict(rules[kind](network, names))


def _unet(network: Any, names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    count = network.config.layers_per_block
    if not isinstance(count, int):
        raise ValueError(
            f"layers_per_block is {count}, expected one number for all blocks: use the format "
            "diffusers"
        )
    for name in names:
        if name in UNET:
            yield UNET[name], (name,)
        elif original := _unet_block(network, name, count + 1):
            yield original, (name,)


def _unet_block(network: Any, name: str, stride: int) -> str:
    """The original name of a layer in a block of a UNet; "" if it has none."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, layer, rest = middle.groups()
        place = 2 * int(layer) if kind == "resnets" else 2 * int(layer) + 1
        return f"middle_block.{place}.{RESNET.get(rest, rest)}"
    if not found:
        return ""
    side, block, kind, layer, rest = found.groups()
    first = int(block) * stride + (side == "down")
    side = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resnets":
        return f"{side}.{first + int(layer)}.0.{RESNET.get(rest, rest)}"
    if kind == "attentions":
        return f"{side}.{first + int(layer)}.1.{rest}"
    if kind == "downsamplers":
        return f"{side}.{first + stride - 1}.0.op"
    place = 2 if hasattr(network.up_blocks[int(block)], "attentions") else 1
    return f"{side}.{first + stride - 1}.{place}.{rest}"


def _flux(network: Any, names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = {*names}
    yield from ((original, (name,)) for original, name in FLUX.items() if name in known)
    for i in range(len(network.transformer_blocks)):
        yield from _block(f"double_blocks.{i}", f"transformer_blocks.{i}", FLUX_DOUBLE, known)
    for i in range(len(network.single_transformer_blocks)):
        block = f"single_transformer_blocks.{i}"
        yield from _block(f"single_blocks.{i}", block, FLUX_SINGLE, known)


def _sd3(network: Any, names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = {*names}
    last = len(network.transformer_blocks) - 1
    known.discard(f"transformer_blocks.{last}.norm1_context.linear")
    yield from ((original, (name,)) for original, name in SD3.items() if name in known)
    for i in range(last + 1):
        yield from _block(f"joint_blocks.{i}", f"transformer_blocks.{i}", SD3_BLOCK, known)


def _block(
    original: str, block: str, table: dict[str, tuple[str, ...]], known: set[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers of one block of a transformer."""
    for name, parts in table.items():
        layers = tuple(f"{block}.{part}" for part in parts)
        if known.issuperset(layers):
            yield f"{original}.{name}", layers
