"""Write a tiny Stable Diffusion pipeline with random weights to the folder `tiny`."""

import string

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.manual_seed(0)
letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
words = [*letters, "<|startoftext|>", "<|endoftext|>"]
start, end = len(letters), len(letters) + 1
text = CLIPTextConfig(
    vocab_size=len(words),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    bos_token_id=start,
    eos_token_id=end,
    pad_token_id=end,
)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    norm_num_groups=8,
    layers_per_block=1,
    attention_head_dim=8,
    cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
vae = AutoencoderKL(
    block_out_channels=(8, 8),
    norm_num_groups=4,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
StableDiffusionPipeline(
    unet=unet,
    vae=vae,
    text_encoder=CLIPTextModel(text),
    tokenizer=CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=16
    ),
    scheduler=DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).save_pretrained("tiny")
