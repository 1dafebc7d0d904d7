"""Five images with captions, a tiny text-to-image pipeline, and the data set of both."""

import diffusers
import numpy as np
import torch
from PIL import Image

from diffcore.training.data.latents import LatentDataset
from tests.helpers import text_networks

CAPTIONS = ("a red cat", "a blue cat", "a red cat", "a dog", "")
DISTINCT_CAPTIONS = ("", "a blue cat", "a dog", "a red cat")
"""The captions that labels index."""

OLD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def write_pipeline(folder, **config):
    """Write a Stable Diffusion pipeline: it predicts epsilon, and its terminal SNR is not zero."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, **OLD)
    text_networks.sd(scheduler, **config).save_pretrained(folder)
    return folder


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 18, 3), np.uint8)).save(path)


def write_images(folder, captions=CAPTIONS):
    """Write images of 18 x 16 pixels, each with a text file beside it."""
    for number, caption in enumerate(captions):
        write_image(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"{caption}\n")
    return folder


def latent_dataset(folder, **options):
    """The data set of `images` and `pipeline` in a folder, with its cache there."""
    defaults = {"cache": str(folder / "cache")}
    return LatentDataset(str(folder / "images"), str(folder / "pipeline"), **(defaults | options))


def prepared_dataset(folder, **options):
    """`latent_dataset` with all entries of its cache."""
    data = latent_dataset(folder, **options)
    data.prepare(torch.device("cpu"), True)
    return data
