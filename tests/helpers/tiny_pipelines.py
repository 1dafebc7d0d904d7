"""Tiny networks of diffusers with random weights, and diffusers' own loop around them."""

from contextlib import contextmanager
from dataclasses import replace

import diffusers
import torch

from diffcore.core.noise import Noise
from diffcore.core.prediction import predict
from diffcore.core.process import Process
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Cosine, Trailing

PROCESS = Process(Cosine(), shape=(3, 8, 8), classes=4, dropout=0.1, sigma_data=0.7)
PLAIN = Process(Cosine(), shape=(3, 8, 8))


def seeded(make, seed=0):
    """A module in eval mode with weights of a seed, also in biases and zero-initialised layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for parameter in module.parameters():
            if not parameter.any() or (parameter == 1).all():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


def align_parameters(module):
    """Copy the weights: at addresses as a file is mapped, some processors round in another way."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
GREY_DIT = DIT | {"in_channels": 1, "out_channels": 1, "num_layers": 3, "norm_num_groups": 1}


def unet(**config):
    return seeded(lambda: diffusers.UNet2DModel(**UNET | config))


def dit(**config):
    return seeded(lambda: diffusers.DiTTransformer2DModel(**DIT | config))


def vae(**config):
    small = {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return seeded(lambda: diffusers.AutoencoderKL(**small | config), 1)


TEXT = torch.Generator().manual_seed(3)
PROMPT, NEGATIVE = (torch.randn(1, 5, 8, generator=TEXT) for _ in range(2))


NO_TEXT = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_2d_condition(**config):
    small = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return seeded(lambda: diffusers.UNet2DConditionModel(**small | config))


def stable_diffusion(scheduler, kind=diffusers.StableDiffusionPipeline, **config):
    """Without text encoder: called with the embeddings of prompts."""
    others = {
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }
    network = unet_2d_condition(**config)
    return quiet(
        kind(unet=network, vae=vae(), scheduler=scheduler, requires_safety_checker=False, **others)
    )


def xl_unet(**config):
    """With SDXL's pooled embedding (8 wide) and six numbers of size (2 wide each)."""
    embedded = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
    return unet_2d_condition(**embedded, projection_class_embeddings_input_dim=8 + 6 * 2, **config)


def sdxl(scheduler, kind=diffusers.StableDiffusionXLPipeline):
    text = {name: value for name, value in NO_TEXT.items() if name[-1] != "3"}
    return quiet(
        kind(unet=xl_unet(), vae=vae(), scheduler=scheduler, add_watermarker=False, **text)
    )


def controlnet(scheduler):
    network = seeded(
        lambda: diffusers.ControlNetModel(
            in_channels=4,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            conditioning_embedding_out_channels=(4, 8),
        ),
        2,
    )
    others = {
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return quiet(
        diffusers.StableDiffusionControlNetPipeline(
            unet=unet_2d_condition(),
            vae=vae(),
            controlnet=network,
            scheduler=scheduler,
            requires_safety_checker=False,
            **others,
        )
    )


def with_ip_adapter(unet, width=8):
    """The network, whose cross-attention reads four tokens of an image too."""
    tokens = 4 * width
    shapes = {
        "proj.weight": (tokens, width),
        "proj.bias": (tokens,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    drawn, attention = seed(7), {}
    names = list(unet.attn_processors)
    for place, name in enumerate(names):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for kind in ("to_k_ip", "to_v_ip"):
                attention[f"{place}.{kind}.weight"] = torch.randn(inner, width, generator=drawn)
    projection = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    unet._load_ip_adapter_weights(
        [{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False
    )
    return unet


def dit_pipeline(scheduler):
    return quiet(diffusers.DiTPipeline(transformer=dit(), vae=vae(), scheduler=scheduler))


def sd3(scheduler, kind=diffusers.StableDiffusion3Pipeline):
    network = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        )
    )
    return quiet(
        kind(transformer=network, vae=vae(shift_factor=0.1), scheduler=scheduler, **NO_TEXT)
    )


def flux_transformer(layers=1, **options):
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=layers,
            num_single_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
            **options,
        )
    )


def flux(scheduler, kind=diffusers.FluxPipeline):
    network = flux_transformer()
    text = {name: value for name, value in NO_TEXT.items() if name[-1] != "3"}
    return quiet(kind(transformer=network, vae=vae(shift_factor=0.1), scheduler=scheduler, **text))


class HalvesDenoiser:
    """A network as a denoiser of a prompt (label 0) or the negative prompt (null label 1).

    It shares no code with `attach`. `evaluate(network, x, t, label)` is the output for one sample.
    """

    def __init__(self, network, evaluate, process, shape):
        self.network, self.evaluate, self.process = (
            network,
            evaluate,
            replace(process, classes=1, dropout=0.1, shape=shape),
        )

    def __call__(self, x, level, condition=None):
        t = torch.full((1,), self.process.time(level))
        pairs = zip(x.split(1), condition.tolist(), strict=True)
        output = torch.cat(
            [self.evaluate(self.network, sample, t, label) for sample, label in pairs]
        )
        return predict(self.process.prediction, output, x, level, 1.0)


@torch.no_grad()
def sampling_loop(network, evaluate, process, rule, sampler, steps, x):
    """Samples of diffcore's loop over Trailing knots, and the number of evaluated samples."""
    denoise = HalvesDenoiser(network, evaluate, process, tuple(x.shape[1:]))
    knots = insert_levels(Trailing().knots(process.schedule, steps), rule.levels(process))
    noise, labels = (
        Noise(torch.arange(len(x)), tuple(x.shape[1:])),
        torch.zeros(len(x), dtype=torch.int64),
    )
    samples, evaluations = integrate(denoise, sampler, x, knots, noise, rule, labels)
    return samples, len(x) * evaluations


def seed(number=0):
    return torch.Generator().manual_seed(number)


def relative_difference(a, b):
    """The greatest difference over the greatest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def counted_samples(network):
    """The number of samples in each forward of the network within the block."""
    counts = []
    first = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    handle = first.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    yield counts
    handle.remove()


@torch.no_grad()
def diffusers_loop(network, scheduler, steps, x, **set_timesteps):
    """The loop of DDPMPipeline, with scale_model_input as the latent pipelines have it."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | set_timesteps))
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(
            network(scaled, t.expand(len(x)), return_dict=False)[0], t, x
        ).prev_sample
    return x
