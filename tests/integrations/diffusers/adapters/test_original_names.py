"""Original names of layers: the converters of diffusers map them to the same layers."""

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from diffcore.integrations.diffusers.adapters.original_names import original_layers
from tests.helpers.tiny_pipelines import seeded


def sd3():
    return seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
        )
    )


def original_checkpoint(network):
    """Weights and biases under the names of `original_layers`."""
    state, found = network.state_dict(), {}
    for name, layers in original_layers(network).items():
        for ending in ("weight", "bias"):
            parts = [state.get(f"{layer}.{ending}") for layer in layers]
            if all(part is not None for part in parts):
                found[f"{name}.{ending}"] = torch.cat(parts)
    return found


def test_the_names_of_stable_diffusion_3_are_those_that_diffusers_converts():
    network = sd3()
    checkpoint, state = original_checkpoint(network), network.state_dict()
    covered = {layer for layers in original_layers(network).values() for layer in layers}
    absent = {
        "pos_embed": state["pos_embed.pos_embed"],
        # Layers whose halves diffusers swaps have no name in `original_layers`.
        "joint_blocks.1.context_block.adaLN_modulation.1.weight": torch.zeros(32, 16),
        "joint_blocks.1.context_block.adaLN_modulation.1.bias": torch.zeros(32),
        "final_layer.adaLN_modulation.1.weight": torch.zeros(32, 16),
        "final_layer.adaLN_modulation.1.bias": torch.zeros(32),
    }
    assert not absent.keys() & checkpoint.keys()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint | absent)
    assert len(covered) == 35
    for layer in covered:
        assert torch.equal(converted[f"{layer}.weight"], state[f"{layer}.weight"]), layer
