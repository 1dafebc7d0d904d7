"""Tiny networks of diffusers with random weights, and diffusers' own loop around them."""

import diffusers
import torch


def seeded(make, seed=0):
    """The module with weights of its own seed, ready to ask; biases and zero-initialised layers are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for parameter in module.parameters():
            if not parameter.any() or (parameter == 1).all():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


def aligned(module):
    """Weights at addresses like those of a new module: a file's lie anywhere, and some processors then round otherwise."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def unet(**config):
    small = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "layers_per_block": 1, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return seeded(lambda: diffusers.UNet2DModel(**small | config))


def dit(**config):
    small = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    return seeded(lambda: diffusers.DiTTransformer2DModel(**small | config))


def vae(**config):
    small = {
        "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.3,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return seeded(lambda: diffusers.AutoencoderKL(**small | config), 1)


TEXT = torch.Generator().manual_seed(3)
PROMPT, NEGATIVE = (torch.randn(1, 5, 8, generator=TEXT) for _ in range(2))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_2d_condition(**config):
    small = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return seeded(lambda: diffusers.UNet2DConditionModel(**small | config))


def stable_diffusion(scheduler, kind=diffusers.StableDiffusionPipeline, **config):
    """Without text encoder: called with the embeddings of prompts."""
    others = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    network = unet_2d_condition(**config)
    return quiet(kind(unet=network, vae=vae(), scheduler=scheduler, requires_safety_checker=False, **others))


def dit_pipeline(scheduler):
    return quiet(diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler))


NO_TEXT = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}


def sd3(scheduler, kind=diffusers.StableDiffusion3Pipeline):
    network = seeded(lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    ))  # fmt: skip
    return quiet(kind(transformer=network, vae=vae(shift_factor=0.1), scheduler=scheduler, **NO_TEXT))


def flux(scheduler):
    network = seeded(lambda: diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ))  # fmt: skip
    text = {name: value for name, value in NO_TEXT.items() if name[-1] != "3"}
    return quiet(diffusers.FluxPipeline(transformer=network, vae=vae(shift_factor=0.1), scheduler=scheduler, **text))


@torch.no_grad()
def theirs(network, scheduler, steps, x, **set_timesteps):
    """The loop of DDPMPipeline, with scale_model_input as the latent pipelines have it."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | set_timesteps))
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(asked, t.expand(len(x)), return_dict=False)[0], t, x).prev_sample
    return x
