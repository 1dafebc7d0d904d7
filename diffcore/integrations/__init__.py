"""diffusers, both ways: its networks in our loop, our samplers and guidance in its pipelines."""

from diffcore.integrations.attach import attach
from diffcore.integrations.denoiser import from_diffusers
from diffcore.integrations.encoding import encode
from diffcore.integrations.guider import DiffcoreGuider
from diffcore.integrations.latents import Latents
from diffcore.integrations.pipeline import DiffcorePipeline
from diffcore.integrations.pretrained import LoRA, Pretrained
from diffcore.integrations.prompts import Prompted, Prompts
from diffcore.integrations.scheduler import DiffcoreScheduler

__all__ = [
    "DiffcoreGuider",
    "DiffcorePipeline",
    "DiffcoreScheduler",
    "Latents",
    "LoRA",
    "Pretrained",
    "Prompted",
    "Prompts",
    "attach",
    "encode",
    "from_diffusers",
]
