"""The cache of latents and embeddings: what is computed again, and what a damaged file does."""

import threading

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffcore.integrations.diffusers import Latents
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.training.data import cache, latents
from tests.helpers.captioned_images import (
    latent_dataset,
    prepared_dataset,
    write_image,
)
from tests.helpers.damaged_folders import edit_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def encoded(captioned, monkeypatch):
    """A function that prepares a data set, and returns how many images and texts were encoded."""
    counts = {"images": 0, "texts": 0}
    posterior = Latents.posterior
    encode_prompt = diffusers.StableDiffusionPipeline.encode_prompt

    def count_images(self, image):
        counts["images"] += len(image)
        return posterior(self, image)

    def count_texts(*arguments, **options):
        counts["texts"] += 1
        return encode_prompt(*arguments, **options)

    monkeypatch.setattr(Latents, "posterior", count_images)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", count_texts)

    def prepare(**options):
        counts.update(images=0, texts=0)
        prepared_dataset(captioned, **options)
        return counts["images"], counts["texts"]

    return prepare


def scale_weights(path):
    tensors = {name: value * 1.1 for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def test_a_second_start_encodes_nothing_and_reads_no_encoder(captioned, encoded, monkeypatch):
    assert encoded() == (5, 5)  # four captions and the null condition
    first = latent_dataset(captioned)
    monkeypatch.setattr(PipelineIndex, "read", None)
    monkeypatch.setattr(PipelineIndex, "read_text_pipeline", None)
    assert encoded() == (0, 0)
    second = latent_dataset(captioned)
    assert second.is_ready
    assert all(torch.equal(second[index][0], first[index][0]) for index in range(5))


def test_only_changed_images_captions_and_sizes_are_encoded_again(captioned, encoded):
    prepared_dataset(captioned)
    write_image(captioned / "images/1.png", 99)
    assert encoded() == (1, 0)
    (captioned / "images/3.txt").write_text("a new dog")
    assert encoded() == (0, 2)  # encode_prompts always adds the null condition
    assert encoded(size=8) == (5, 5)
    assert encoded(size=8, fit="pad") == (5, 0)
    assert encoded(flip=True) == (5, 0)
    assert encoded() == (0, 0)


def test_photos_are_encoded_upright_and_not_read_from_a_cache_of_stored_pixels(
    captioned, encoded, monkeypatch
):
    path = captioned / "images/1.png"
    with Image.open(path) as stored:
        exif = stored.getexif()
        exif[0x0112] = 6
        stored.save(path, exif=exif)
        upright = np.rot90(np.asarray(stored), -1)
    with monkeypatch.context() as patch:
        patch.setattr(latents, "DECODING", "stored")
        encoded()
    assert encoded() == (5, 0)
    rotated = latent_dataset(captioned)[1][0]
    Image.fromarray(upright).save(path)
    encoded()
    assert torch.equal(latent_dataset(captioned)[1][0], rotated)


def test_another_vae_encodes_the_images_again(captioned, encoded):
    before = prepared_dataset(captioned)
    scale_weights(captioned / "pipeline/vae/diffusion_pytorch_model.safetensors")
    assert encoded() == (5, 0)
    assert not torch.equal(latent_dataset(captioned)[0][0], before[0][0])
    edit_json(captioned / "pipeline/vae/config.json", scaling_factor=0.4)
    assert encoded() == (5, 0)


def test_another_text_encoder_encodes_the_captions_again(captioned, encoded):
    before = prepared_dataset(captioned).prompts()
    scale_weights(captioned / "pipeline/text_encoder/model.safetensors")
    assert encoded() == (0, 5)
    after = latent_dataset(captioned).prompts()
    name = "encoder_hidden_states"
    assert not torch.equal(after.tensors[name], before.tensors[name])


def test_networks_with_different_text_inputs_share_no_embeddings(captioned):
    """Flux dev and schnell have equal encoders; only dev has the guidance strength as an input."""
    before = latent_dataset(captioned)
    edit_json(captioned / "pipeline/unet/config.json", guidance_embeds=True)
    after = latent_dataset(captioned)
    assert after.embeddings.folder != before.embeddings.folder
    assert after.latents.folder == before.latents.folder


def test_an_interrupted_computation_continues_from_its_whole_shards(
    captioned, encoded, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD", 2)
    posterior, images = Latents.posterior, []

    def stop_after_three(self, image):
        if len(images) == 3:
            raise KeyboardInterrupt
        images.append(image)
        return posterior(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Latents, "posterior", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            prepared_dataset(captioned)
    folder = latent_dataset(captioned).latents.folder
    (folder / ".half.safetensors.123").write_bytes(b"half")
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert encoded() == (3, 7)  # three shards of captions, each with the null condition
    assert latent_dataset(captioned).is_ready


def test_other_ranks_wait_until_the_first_has_encoded(captioned, monkeypatch):
    monkeypatch.setattr(latents, "POLL_SECONDS", 0.01)
    cpu, first, second = torch.device("cpu"), latent_dataset(captioned), latent_dataset(captioned)
    waiting = threading.Thread(target=second.prepare, args=(cpu, False))
    waiting.start()
    assert not second.is_ready
    first.prepare(cpu, True)
    waiting.join(20)
    assert second.is_ready
    assert torch.equal(second[0][0], first[0][0])


def test_a_truncated_shard_is_named(captioned):
    folder = prepared_dataset(captioned).latents.folder
    (path,) = folder.glob("*.safetensors")
    (folder / "torn.safetensors").write_bytes(path.read_bytes()[:-5])
    path.unlink()
    message = r"torn.safetensors of the cache cannot be read .*: delete it"
    with pytest.raises(ValueError, match=message):
        latent_dataset(captioned)


def test_a_shard_with_a_changed_byte_is_refused(captioned):
    data = prepared_dataset(captioned)
    (path,) = data.latents.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="of the cache is not what was written: delete it"):
        data.latents.read(data.latent_key(0))
