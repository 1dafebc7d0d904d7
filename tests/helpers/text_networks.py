"""Tiny text-conditioned pipelines of each family, with random encoders and letter tokenizers."""

import string

import diffusers
import transformers

from tests.helpers.tiny_pipelines import flux_transformer, quiet, seeded, unet_2d_condition, vae

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = [
    *string.ascii_lowercase,
    *(letter + "</w>" for letter in string.ascii_lowercase),
    START,
    END,
]
LENGTH = 12


def clip_tokenizer():
    return transformers.CLIPTokenizer(
        vocab={w: i for i, w in enumerate(WORDS)}, merges=[], model_max_length=LENGTH
    )


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    vocab = [(piece, -float(place)) for place, piece in enumerate(pieces)]
    return transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def clip(kind=transformers.CLIPTextModel, seed=4, **config):
    small = {
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "projection_dim": 8,
        "bos_token_id": WORDS.index(START),
        "eos_token_id": WORDS.index(END),
        "pad_token_id": WORDS.index(END),
    }
    return seeded(lambda: kind(transformers.CLIPTextConfig(**small | config)), seed)


def projected(seed, **config):
    return clip(transformers.CLIPTextModelWithProjection, seed, **config)


def t5(d_model):
    config = transformers.T5Config(
        vocab_size=40,
        d_model=d_model,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        tie_word_embeddings=False,
    )
    return seeded(lambda: transformers.T5EncoderModel(config), 6)


def sd(scheduler, **config):
    return quiet(
        diffusers.StableDiffusionPipeline(
            unet=unet_2d_condition(**config),
            vae=vae(),
            scheduler=scheduler,
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl(scheduler, **config):
    unet = unet_2d_condition(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            unet=unet,
            vae=vae(),
            scheduler=scheduler,
            text_encoder=clip(seed=4),
            tokenizer=clip_tokenizer(),
            text_encoder_2=projected(5),
            tokenizer_2=clip_tokenizer(),
            add_watermarker=False,
            **config,
        )
    )


def sd3(scheduler):
    network = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        )
    )
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=network,
            vae=vae(shift_factor=0.1),
            scheduler=scheduler,
            text_encoder=projected(4),
            tokenizer=clip_tokenizer(),
            text_encoder_2=projected(5),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5(16),
            tokenizer_3=t5_tokenizer(),
        )
    )


def flux(scheduler, guidance_embeds=True):
    network = flux_transformer(guidance_embeds=guidance_embeds)
    return quiet(
        diffusers.FluxPipeline(
            transformer=network,
            vae=vae(shift_factor=0.1),
            scheduler=scheduler,
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5(8),
            tokenizer_2=t5_tokenizer(),
        )
    )


def pixart(scheduler, kind=diffusers.PixArtAlphaPipeline, **config):
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "num_embeds_ada_norm": 1000,
    }
    network = seeded(lambda: diffusers.PixArtTransformer2DModel(**small | config))
    return quiet(
        kind(
            transformer=network,
            vae=vae(),
            scheduler=scheduler,
            text_encoder=t5(8),
            tokenizer=t5_tokenizer(),
        )
    )


def sana(scheduler):
    """Without a VAE: 32 pixels for each of x."""
    network = seeded(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=8,
            sample_size=8,
            timestep_scale=0.5,
        )
    )
    config = transformers.Gemma2Config(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    encoder = seeded(lambda: transformers.Gemma2Model(config), 6)
    return quiet(
        diffusers.SanaPipeline(
            transformer=network,
            vae=None,
            scheduler=scheduler,
            text_encoder=encoder,
            tokenizer=t5_tokenizer(),
        )
    )


def ddim(**config):
    return diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", steps_offset=1, **config
    )


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
