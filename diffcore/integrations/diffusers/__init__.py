"""Networks of diffusers in the sampling loop of diffcore; samplers and guidance in its
pipelines.
"""

from diffcore.io.extras import import_extra

for _package in ("diffusers", "transformers"):
    import_extra(_package, "diffcore.integrations.diffusers")

from diffcore.integrations.diffusers.adapters.lora import LoRA
from diffcore.integrations.diffusers.guidance.attach import attach, detach
from diffcore.integrations.diffusers.guidance.guider import DiffcoreGuider
from diffcore.integrations.diffusers.loading.network import from_diffusers
from diffcore.integrations.diffusers.loading.prompts import PromptNetwork, Prompts
from diffcore.integrations.diffusers.loading.text_encoding import encode_prompts
from diffcore.integrations.diffusers.loading.vae import Latents
from diffcore.integrations.diffusers.pipeline.controlled_network import ControlledNetwork
from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline
from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler

__all__ = [
    "ControlledNetwork",
    "DiffcoreGuider",
    "DiffcorePipeline",
    "DiffcoreScheduler",
    "Latents",
    "LoRA",
    "PretrainedNetwork",
    "PromptNetwork",
    "Prompts",
    "attach",
    "detach",
    "encode_prompts",
    "from_diffusers",
]
