"""Latents and text embeddings cached in half precision: what is rounded, and by how much."""

import pytest
import torch
from safetensors.torch import load_file

from diffcore.core.random import Stream, normal
from diffcore.integrations.diffusers import PretrainedNetwork
from diffcore.training.data.cache import Cache
from tests.helpers.captioned_images import latent_dataset, prepared_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_dtypes(cache):
    return {value.dtype for path in cache.folder.iterdir() for value in load_file(path).values()}


def denoising_loss(data, folder):
    """Mean squared error of the pipeline's ε at α = 0.8, σ = 0.6 on the first visits."""
    network = data.label_wrapper(CPU)(PretrainedNetwork(folder / "pipeline")).eval()
    items = [data.item(index, 0, index) for index in range(len(data))]
    x0, labels = torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
    eps = normal(0, Stream.NOISE, 0, x0.shape)[0]
    with torch.no_grad():
        found = network(0.8 * x0 + 0.6 * eps, torch.full((len(x0),), 300.0), labels)
    return float((found - eps).square().mean())


def test_entries_are_those_of_float32_rounded_once_and_have_a_key_of_their_own(captioned):
    exact = prepared_dataset(captioned)
    loss = denoising_loss(exact, captioned)
    for name, dtype in DTYPES.items():
        assert not latent_dataset(captioned, dtype=name).is_ready
        data = prepared_dataset(captioned, dtype=name)
        assert stored_dtypes(data.latents) == stored_dtypes(data.embeddings) == {dtype}
        assert data.content_hash != exact.content_hash
        for key in map(exact.latent_key, range(len(exact))):
            entry = data.latents.read(key)
            for part, value in exact.latents.read(key).items():
                assert entry[part].dtype == torch.float32
                assert torch.equal(entry[part], value.to(dtype).float())
                assert not torch.equal(entry[part], value)
        assert data.item(0, 0, 0)[0].dtype == data[0][0].dtype == torch.float32
        for argument, value in exact.prompts().tensors.items():
            assert torch.equal(data.prompts().tensors[argument], value.to(dtype).float())
        difference = abs(denoising_loss(data, captioned) / loss - 1)
        print(f"{name}: relative difference of the loss {difference:.1e}")
        assert 0 < difference < 10 * torch.finfo(dtype).eps
    assert latent_dataset(captioned).is_ready


def test_sizes_are_not_rounded_and_integers_stay(tmp_path):
    entry = {"ids": torch.tensor([1023.0, 4097.0]), "mask": torch.ones(2, 3, dtype=torch.int64)}
    Cache(tmp_path, "bfloat16").compute(["a"], lambda keys: [entry], "captions")
    found = Cache(tmp_path, "bfloat16").read("a")
    assert all(torch.equal(found[name], value) for name, value in entry.items())
    assert found["mask"].dtype == torch.int64


def test_values_beyond_float16_are_refused(tmp_path):
    entry = {"states": torch.full((2, 2), 1e5)}
    with pytest.raises(ValueError, match=r"captions have values up to 1e\+05, which float16"):
        Cache(tmp_path, "float16").compute(["a"], lambda keys: [entry], "captions")
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32"):
        Cache(tmp_path, "int8")
