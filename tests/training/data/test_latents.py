"""Latents and embeddings are those of diffusers, made once, and made again where an image, a caption or an encoder changes."""

import csv
import json
import shutil
import threading

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.core.random import Stream, normal
from diffcore.integrations.diffusers import Latents, encode_prompts
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.training.data import DataOrder, cache, load_batches
from diffcore.training.data import latents as encoded
from diffcore.training.data.latents import LatentDataset
from tests.helpers.captioned_images import (
    CAPTIONS,
    change_json,
    write_image,
    write_images,
    write_pipeline,
)

CPU = torch.device("cpu")
DISTINCT = ("", "a blue cat", "a dog", "a red cat")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("original") / "pipeline")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def place(tmp_path, original):
    """A folder with images/ and pipeline/, to be changed."""
    shutil.copytree(original, tmp_path / "pipeline")
    write_images(tmp_path / "images")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """How many images the VAE and how many texts the encoders were asked for."""
    counts = {"images": 0, "texts": 0}
    posterior = Latents.posterior
    encode_prompt = diffusers.StableDiffusionPipeline.encode_prompt

    def counted(self, image):
        counts["images"] += len(image)
        return posterior(self, image)

    def counting(*arguments, **options):
        counts["texts"] += 1
        return encode_prompt(*arguments, **options)

    monkeypatch.setattr(Latents, "posterior", counted)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", counting)
    return counts


def data(place, **options):
    return LatentDataset(
        str(place / "images"),
        str(place / "pipeline"),
        **({"cache": str(place / "cache")} | options),
    )


def made(place, **options):
    ready = data(place, **options)
    ready.prepare(CPU, True)
    return ready


def counted(calls, place, **options):
    """The images and texts encoded to make the data."""
    calls.update(images=0, texts=0)
    made(place, **options)
    return calls["images"], calls["texts"]


# What they are --------------------------------------------------------------------------------------------------------


def test_latents_are_the_posterior_of_the_vae_scaled_and_shifted_as_its_config_says(place):
    change_json(place / "pipeline/vae/config.json", scaling_factor=0.7, shift_factor=0.2)
    ready = made(place)
    vae = PipelineIndex(place / "pipeline").read("vae")
    for index in range(len(ready)):
        with torch.no_grad():
            posterior = vae.encode(ready.files[index][0][None]).latent_dist
        entry = ready.latents.read(ready.keys[index])
        torch.testing.assert_close(
            ready[index][0], (posterior.mean[0] - 0.2) * 0.7, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(entry["std"], posterior.std[0] * 0.7, rtol=0, atol=1e-6)
        assert ready[index][0].shape == (4, 8, 8)


def test_each_visit_draws_latents_anew_by_its_position(place):
    ready = made(place)
    mean, std = (ready.latents.read(ready.keys[1])[name] for name in ("mean", "std"))
    drawn = ready.item(1, 7, 2**33)[0]
    assert torch.equal(drawn, mean + std * normal(7, Stream.LATENT, 2**33, mean.shape)[0])
    assert not torch.equal(drawn, ready.item(1, 7, 2**33 + 1)[0])
    order = DataOrder(len(ready), 7, 4, 1, 0, 1).steps(1, 2)
    (batch,) = load_batches(ready, order, 0)
    index = [order.index(position) for position in range(4, 8)]
    expected = [
        ready.item(i, 7, position)[0] for i, position in zip(index, range(4, 8), strict=True)
    ]
    assert torch.equal(batch.x0, torch.stack(expected))


def test_labels_are_places_in_a_bank_of_the_embeddings_of_the_captions(place):
    ready = made(place)
    assert ready.texts == DISTINCT
    assert [ready.texts[ready[index][1]] for index in range(5)] == list(CAPTIONS)
    bank, expected = (
        ready.prompts(),
        encode_prompts(PipelineIndex(place / "pipeline").read_text_pipeline(), DISTINCT),
    )
    assert bank.texts == DISTINCT
    assert bank.tensors.keys() == expected.tensors.keys() == {"encoder_hidden_states"}
    assert torch.equal(
        bank.tensors["encoder_hidden_states"], expected.tensors["encoder_hidden_states"]
    )


def test_a_large_bank_stays_on_the_host(place, monkeypatch):
    ready, meta = made(place), torch.device("meta")
    assert (
        ready.label_wrapper(meta)(torch.nn.Identity())
        .prompts.tensors["encoder_hidden_states"]
        .device
        == meta
    )
    monkeypatch.setattr(encoded, "LARGE", 100)
    assert (
        ready.label_wrapper(meta)(torch.nn.Identity())
        .prompts.tensors["encoder_hidden_states"]
        .device
        == CPU
    )


def test_a_flip_mirrors_the_image_and_not_its_latents(place):
    ready, still = made(place, flip=True), data(place)
    vae = Latents(PipelineIndex(place / "pipeline").read("vae"))
    with torch.no_grad():
        both = [
            vae.posterior(image)[0][0]
            for image in (ready.files[0][0][None], ready.files[0][0][None].flip(-1))
        ]
    noise = [normal(3, Stream.LATENT, position, (4, 8, 8))[0] for position in range(40)]
    keys = (ready.keys[0], encoded._mirrored(ready.keys[0]))
    seen = [ready.item(0, 3, position)[0] for position in range(40)]
    drawn = [
        [mean + ready.latents.read(key)["std"] * z for mean, key in zip(both, keys, strict=True)]
        for z in noise
    ]
    chosen = [
        [torch.allclose(x, one, atol=1e-5) for one in pair].index(True)
        for x, pair in zip(seen, drawn, strict=True)
    ]
    assert 10 < sum(chosen) < 30
    assert torch.equal(still[0][0], ready[0][0])


def test_pictures_are_what_the_vae_decodes(place):
    ready = made(place)
    z = torch.stack([ready[0][0], ready[1][0]])
    with torch.no_grad():
        expected = PipelineIndex(place / "pipeline").read("vae").decode(z / 0.3).sample
    torch.testing.assert_close(ready.decode(z), expected, rtol=0, atol=1e-5)


# Made once ------------------------------------------------------------------------------------------------------------


def test_a_second_start_asks_no_encoder_and_loads_none(place, calls, monkeypatch):
    assert counted(calls, place) == (5, 5)  # four captions and the null row
    first = data(place)
    monkeypatch.setattr(PipelineIndex, "read", None)
    monkeypatch.setattr(PipelineIndex, "read_text_pipeline", None)
    assert counted(calls, place) == (0, 0)
    second = data(place)
    assert second.is_ready
    assert all(torch.equal(second[index][0], first[index][0]) for index in range(5))


def test_what_changes_is_made_again_and_nothing_else(place, calls):
    made(place)
    write_image(place / "images/1.png", 99)
    assert counted(calls, place) == (1, 0)
    (place / "images/3.txt").write_text("a new dog")
    assert counted(calls, place) == (0, 2)  # with the null row, which encode gives each time
    assert counted(calls, place, size=8) == (5, 5)
    assert counted(calls, place, size=8, fit="pad") == (5, 0)
    assert counted(calls, place, flip=True) == (5, 0)
    assert counted(calls, place) == (0, 0)


def test_latents_are_made_again_for_another_vae_and_embeddings_for_another_text_encoder(
    place, calls
):
    before = made(place)
    weights = place / "pipeline/vae/diffusion_pytorch_model.safetensors"
    save_file(
        {name: value * 1.1 for name, value in load_file(weights).items()}, weights, {"format": "pt"}
    )
    assert counted(calls, place) == (5, 0)
    assert not torch.equal(data(place)[0][0], before[0][0])
    change_json(place / "pipeline/vae/config.json", scaling_factor=0.4)
    assert counted(calls, place) == (5, 0)
    weights = place / "pipeline/text_encoder/model.safetensors"
    save_file(
        {name: value * 1.1 for name, value in load_file(weights).items()}, weights, {"format": "pt"}
    )
    assert counted(calls, place) == (0, 5)
    old, new = (one.prompts().tensors["encoder_hidden_states"] for one in (before, data(place)))
    assert not torch.equal(old, new)


def test_a_build_that_is_stopped_leaves_whole_shards_and_goes_on_from_them(
    place, calls, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD", 2)
    posterior = Latents.posterior

    def stopping(self, image):
        if calls["images"] == 3:
            raise KeyboardInterrupt
        return posterior(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Latents, "posterior", stopping)
        with pytest.raises(KeyboardInterrupt):
            made(place)
    folder = data(place).latents.folder
    (folder / ".half.safetensors.123").write_bytes(b"half")
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert counted(calls, place) == (3, 7)  # three shards of captions, each with the null row
    assert data(place).is_ready


def test_other_processes_wait_for_the_first(place, monkeypatch):
    monkeypatch.setattr(encoded, "POLL_SECONDS", 0.01)
    first, second = data(place), data(place)
    waiting = threading.Thread(target=second.prepare, args=(CPU, False))
    waiting.start()
    assert not second.is_ready
    first.prepare(CPU, True)
    waiting.join(20)
    assert second.is_ready
    assert torch.equal(second[0][0], first[0][0])


# Captions and labels --------------------------------------------------------------------------------------------------


def rows(place):
    return [
        {"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(CAPTIONS)
    ]


def test_captions_in_metadata_are_those_beside_the_images(place):
    beside = data(place)
    for text in (place / "images").glob("*.txt"):
        text.unlink()
    (place / "images/metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows(place))
    )
    assert (data(place).texts, data(place).labels) == (beside.texts, beside.labels)
    (place / "images/metadata.jsonl").unlink()
    with (place / "images/metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows(place))
    assert (data(place).texts, data(place).labels) == (beside.texts, beside.labels)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_keep_their_line_breaks(place, name):
    said = ["a\nb", "a\u2028b", "a\x0cb", 'a "b"', "кот 猫"]
    named = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(said)]
    with (place / "images" / name).open("w", newline="", encoding="utf-8") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(named)
        else:
            file.write("\n \n".join(json.dumps(row, ensure_ascii=False) for row in named))
    ready = data(place)
    assert [ready.texts[label] for label in ready.labels] == said


def test_the_mark_of_utf_8_is_no_part_of_a_caption(place):
    before = data(place)
    (place / "images/3.txt").write_text("a dog", encoding="utf-8-sig")
    assert (data(place).texts, data(place).rows) == (before.texts, before.rows)


def test_networks_that_are_told_other_things_share_no_captions(place):
    """Flux's two have the same encoders and class of pipeline, and one is told the strength of guidance."""
    before = data(place)
    change_json(place / "pipeline/unet/config.json", guidance_embeds=True)
    assert data(place).embeddings.folder != before.embeddings.folder
    assert data(place).latents.folder == before.latents.folder


def test_without_captions_the_sub_folders_are_classes(place):
    shutil.rmtree(place / "images")
    for label, name in enumerate("ab"):
        write_image(place / f"images/{name}/1.png", label)
    ready = made(place)
    assert (ready.texts, ready.labels) == ((), [0, 1])
    identity = torch.nn.Identity()
    assert ready.label_wrapper(CPU)(identity) is identity
    write_images(place / "images")
    assert data(place, captions=False).texts == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda images: (images / "3.txt").unlink(),
            r"1 of the 5 images of .* have no caption, such as 3.png",
        ),
        (
            lambda images: (images / "metadata.jsonl").write_text('{"file_name": "0.png"}\n'),
            "row 1 .* has no file_name or",
        ),
        (lambda images: (images / "3.txt").write_bytes(b"caf\xe9"), "3.txt is not UTF-8"),
        (
            lambda images: (images / "metadata.jsonl").write_text("{\n"),
            "metadata.jsonl cannot be read",
        ),
        (
            lambda images: (images / "metadata.jsonl").write_text("[1]\n"),
            "holds lines that are no objects",
        ),
        (lambda images: shutil.rmtree(images.parent / "pipeline/vae"), "vae.* is missing"),
        (
            lambda images: change_json(
                images.parent / "pipeline/model_index.json", vae=[None, None]
            ),
            "has no vae, only",
        ),
        (
            lambda images: change_json(
                images.parent / "pipeline/model_index.json", text_encoder=[None, None]
            ),
            "has no text_encoder, only",
        ),
    ],
    ids=[
        "no caption",
        "no text",
        "no UTF-8",
        "no JSON",
        "no object",
        "no folder of the VAE",
        "no VAE",
        "no text encoder",
    ],
)
def test_what_cannot_be_encoded_is_refused_in_a_line(place, spoil, message):
    spoil(place / "images")
    with pytest.raises(ValueError, match=message):
        data(place)


def test_a_torn_shard_is_named(place):
    folder = made(place).latents.folder
    (path,) = folder.glob("*.safetensors")
    path.rename(folder / "torn.safetensors")
    (folder / "torn.safetensors").write_bytes((folder / "torn.safetensors").read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"torn.safetensors of the cache cannot be read .*: delete it"
    ):
        data(place)


def test_a_shard_with_a_changed_byte_is_not_trained_on(place):
    ready = made(place)
    (path,) = ready.latents.folder.glob("*.safetensors")
    written = bytearray(path.read_bytes())
    written[-3] ^= 1
    path.write_bytes(written)
    with pytest.raises(ValueError, match="of the cache is not what was written: delete it"):
        ready.latents.read(ready.keys[0])
