"""Latents and text embeddings: equal to those of diffusers, drawn by position, indexed by label."""

import csv
import json
import math
import shutil

import pytest
import torch

from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.integrations.diffusers import Latents, encode_prompts
from diffcore.integrations.diffusers.loading import prompts
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.training.data import DataOrder, load_batches
from tests.helpers.captioned_images import (
    CAPTIONS,
    DISTINCT_CAPTIONS,
    latent_dataset,
    prepared_dataset,
    write_image,
)
from tests.helpers.damaged_folders import edit_json

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_latents_are_the_posterior_of_the_vae_scaled_and_shifted_by_its_config(captioned):
    edit_json(captioned / "pipeline/vae/config.json", scaling_factor=0.7, shift_factor=0.2)
    data = prepared_dataset(captioned)
    vae = PipelineIndex(captioned / "pipeline").read("vae")
    for index in range(len(data)):
        with torch.no_grad():
            posterior = vae.encode(data.images[index][None]).latent_dist
        mean, std = (posterior.mean[0] - 0.2) * 0.7, posterior.std[0] * 0.7
        entry = data.latents.read(data.latent_key(index))
        torch.testing.assert_close(data[index][0], mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(entry["std"], std, rtol=0, atol=1e-6)
        assert data[index][0].shape == (4, 8, 8)


def test_each_visit_draws_new_latents_keyed_by_its_position(captioned):
    data = prepared_dataset(captioned)
    entry = data.latents.read(data.latent_key(1))
    noise = normal(7, Stream.LATENT, 2**33, (4, 8, 8))[0]
    z = data.item(1, 7, 2**33)[0]
    assert torch.equal(z, entry["mean"] + entry["std"] * noise)
    assert not torch.equal(z, data.item(1, 7, 2**33 + 1)[0])
    order = DataOrder(len(data), 7, 4, 1, 0, 1).steps(1, 2)
    process = Process(shape=(4, 8, 8), low=-math.inf, high=math.inf)
    (batch,) = load_batches(data, order, process, 0)
    expected = [data.item(order.index(position), 7, position)[0] for position in range(4, 8)]
    assert torch.equal(batch.x0, torch.stack(expected))


def test_labels_index_the_embeddings_of_the_captions(captioned):
    data = prepared_dataset(captioned)
    assert data.texts == DISTINCT_CAPTIONS
    assert [data.texts[data[index][1]] for index in range(5)] == list(CAPTIONS)
    pipeline = PipelineIndex(captioned / "pipeline").read_text_pipeline()
    bank, expected = data.prompts(), encode_prompts(pipeline, DISTINCT_CAPTIONS)
    assert bank.texts == DISTINCT_CAPTIONS
    assert bank.tensors.keys() == expected.tensors.keys() == {"encoder_hidden_states"}
    for name, value in expected.tensors.items():
        assert torch.equal(bank.tensors[name], value)


def test_a_small_bank_is_on_the_device_and_a_large_one_on_the_host(captioned, monkeypatch):
    data, meta = prepared_dataset(captioned), torch.device("meta")

    def bank_device():
        prompts = data.label_wrapper(meta)(torch.nn.Identity()).prompts
        return prompts.tensors["encoder_hidden_states"].device

    assert bank_device() == meta
    monkeypatch.setattr(prompts, "LARGE_BANK", 100)
    assert bank_device() == CPU


def test_flip_mirrors_the_image_before_it_is_encoded(captioned):
    data, without = prepared_dataset(captioned, flip=True), latent_dataset(captioned)
    vae, image = Latents(PipelineIndex(captioned / "pipeline").read("vae")), data.images[0][None]
    with torch.no_grad():
        posteriors = [vae.posterior(x) for x in (image, image.flip(-1))]
    mirrored = 0
    for position in range(40):
        noise = normal(3, Stream.LATENT, position, (4, 8, 8))[0]
        draws = [mean[0] + std[0] * noise for mean, std in posteriors]
        z = data.item(0, 3, position)[0]
        mirrored += [torch.allclose(z, draw, atol=1e-5) for draw in draws].index(True)
    assert 10 < mirrored < 30
    assert torch.equal(without[0][0], data[0][0])


def test_decode_gives_the_images_of_the_vae(captioned):
    data = prepared_dataset(captioned)
    z = torch.stack([data[0][0], data[1][0]])
    with torch.no_grad():
        expected = PipelineIndex(captioned / "pipeline").read("vae").decode(z / 0.3).sample
    torch.testing.assert_close(data.decode(z), expected, rtol=0, atol=1e-5)


def write_metadata(file, captions):
    """A metadata.csv, or a metadata.jsonl with a blank line after each row."""
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(captions)]
    with file.open("w", newline="", encoding="utf-8") as opened:
        if file.suffix == ".csv":
            writer = csv.DictWriter(opened, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            opened.write("\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_in_metadata_equal_those_in_text_files(captioned, name):
    expected = latent_dataset(captioned)
    for text in (captioned / "images").glob("*.txt"):
        text.unlink()
    write_metadata(captioned / "images" / name, CAPTIONS)
    data = latent_dataset(captioned)
    assert (data.texts, data.labels.tolist()) == (expected.texts, expected.labels.tolist())


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_keep_line_breaks_quotes_and_letters(captioned, name):
    captions = ["a\nb", "a\u2028b", "a\x0cb", 'a "b"', "кот 猫"]
    write_metadata(captioned / "images" / name, captions)
    data = latent_dataset(captioned)
    assert [data.texts[label] for label in data.labels] == captions


def test_a_byte_order_mark_is_not_part_of_a_caption(captioned):
    before = latent_dataset(captioned)
    (captioned / "images/3.txt").write_text("a dog", encoding="utf-8-sig")
    after = latent_dataset(captioned)
    assert (after.texts, after.text_keys) == (before.texts, before.text_keys)


def test_without_captions_the_sub_folders_are_classes(captioned):
    shutil.rmtree(captioned / "images")
    for label, name in enumerate("ab"):
        write_image(captioned / f"images/{name}/1.png", label)
    data = prepared_dataset(captioned)
    assert (data.texts, data.labels.tolist()) == ((), [0, 1])
    identity = torch.nn.Identity()
    assert data.label_wrapper(CPU)(identity) is identity


def test_captions_are_ignored_on_request(captioned):
    assert latent_dataset(captioned, captions=False).texts == ()


def write_rows(file, numbers):
    """A metadata file with a row for each of some images."""
    head, row = ("file_name,text", "{}.png,a cat") if file.suffix == ".csv" else ("", JSON_ROW)
    file.write_text("\n".join([head, *(row.replace("{}", str(number)) for number in numbers)]))


JSON_ROW = '{"file_name": "{}.png", "text": "a cat"}'


ERRORS = {
    "no caption": (
        lambda images: (images / "3.txt").unlink(),
        r"1 of the 5 images of .* have no caption, such as 3.png",
    ),
    "no text": (
        lambda images: (images / "metadata.jsonl").write_text('{"file_name": "0.png"}\n'),
        "row 1 .* has no file_name or",
    ),
    "half of a character": (
        lambda images: (images / "metadata.jsonl").write_text(
            '{"file_name": "0.png", "text": "a \\ud83d"}\n'
        ),
        "row 1 of .*metadata.jsonl has half of a surrogate pair, .*: write the text as UTF-8",
    ),
    "not UTF-8": (
        lambda images: (images / "3.txt").write_bytes(b"caf\xe9"),
        "3.txt is not UTF-8",
    ),
    "not JSON": (
        lambda images: (images / "metadata.jsonl").write_text("{\n"),
        "metadata.jsonl cannot be read",
    ),
    "nested too deeply": (
        lambda images: (images / "metadata.jsonl").write_text("[" * 200_000),
        "metadata.jsonl cannot be read",
    ),
    "a number of too many digits": (
        lambda images: (images / "metadata.jsonl").write_text('{"n": ' + "9" * 5000 + "}\n"),
        "metadata.jsonl cannot be read",
    ),
    "a comma without quotes": (
        lambda images: (images / "metadata.csv").write_text("file_name,text\n0.png,a cat, red\n"),
        "row 1 .*metadata.csv has more fields than the header: put double quotes",
    ),
    "not an object": (
        lambda images: (images / "metadata.jsonl").write_text("[1]\n"),
        "has lines that are not JSON objects",
    ),
    "no folder of the VAE": (
        lambda images: shutil.rmtree(images.parent / "pipeline/vae"),
        "vae.* is missing",
    ),
    "no VAE": (
        lambda images: edit_json(images.parent / "pipeline/model_index.json", vae=[None, None]),
        "has no vae, only",
    ),
    "no text encoder": (
        lambda images: edit_json(
            images.parent / "pipeline/model_index.json", text_encoder=[None, None]
        ),
        "has no text_encoder, only",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_data_that_cannot_be_encoded_is_refused(captioned, name):
    damage, message = ERRORS[name]
    damage(captioned / "images")
    with pytest.raises(ValueError, match=message):
        latent_dataset(captioned)


def test_a_pipeline_that_encodes_no_prompts_is_refused_before_latents_are_encoded(captioned):
    edit_json(captioned / "pipeline/model_index.json", _class_name="PipelineOfAUser")
    with pytest.raises(ValueError, match="names the pipeline PipelineOfAUser, expected one of"):
        latent_dataset(captioned)
    assert not (captioned / "cache").exists()
    latent_dataset(captioned, captions=False)
