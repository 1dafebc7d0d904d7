"""A handful of images with captions, and the folder of a tiny text-to-image pipeline to encode them."""

import json

import diffusers
import numpy as np
from PIL import Image

from tests.helpers import text_networks

CAPTIONS = ("a red cat", "a blue cat", "a red cat", "a dog", "")
OLD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def write_pipeline(folder, **config):
    """StableDiffusion's parts and scheduler: epsilon, noise that does not reach zero SNR."""
    text_networks.sd(diffusers.PNDMScheduler(skip_prk_steps=True, **OLD), **config).save_pretrained(
        folder
    )
    return folder


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 18, 3), np.uint8)).save(path)


def write_images(folder, captions=CAPTIONS):
    """Images of 18 x 16, each with a text beside it."""
    for number, caption in enumerate(captions):
        write_image(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"{caption}\n")
    return folder


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
