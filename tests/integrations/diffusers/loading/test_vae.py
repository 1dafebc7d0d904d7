"""Latents of VAEs in half precision, on another device, and of several architectures."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.integrations.diffusers import DiffcorePipeline, Latents
from tests.helpers.tiny_pipelines import dit, quiet, relative_difference, seed, seeded, vae

IMAGE = torch.rand(2, 3, 16, 16, generator=seed(1)) * 2 - 1
Z = torch.randn(2, 4, 8, 8, generator=seed(2))


def overflowing():
    """A VAE whose activations exceed 65504, the largest number of float16."""
    model = vae()
    model.post_quant_conv.weight.data *= 300
    model.decoder.conv_in.weight.data *= 3000
    model.quant_conv.weight.data *= 300
    return model


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@torch.no_grad()
def test_a_vae_in_half_precision_has_the_latents_and_images_of_float32(dtype):
    exact, half = Latents(vae(force_upcast=False)), Latents(vae(force_upcast=False).to(dtype))
    for ours, theirs in (
        (half.encode(IMAGE), exact.encode(IMAGE)),
        (half.encode(IMAGE, seed(3)), exact.encode(IMAGE, seed(3))),
        (half.decode(Z), exact.decode(Z)),
    ):
        assert ours.dtype == torch.float32
        assert relative_difference(ours, theirs) < 0.05
    assert half.decode(Z.to(dtype)).dtype == dtype
    assert exact.decode(Z.to(dtype)).dtype == dtype


@torch.no_grad()
def test_a_vae_that_overflows_in_float16_is_evaluated_in_float32():
    exact, half = Latents(overflowing()), Latents(overflowing().half())
    raw = half.vae.decode((Z / 0.3).half()).sample
    assert not raw.isfinite().all()
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: half.decode(Z), range(8)))
    for image in images:
        torch.testing.assert_close(image, exact.decode(Z), rtol=0.01, atol=0.01)
    assert relative_difference(half.encode(IMAGE), exact.encode(IMAGE)) < 0.01
    assert half.vae.dtype == torch.float16
    kept = Latents(overflowing().half())
    kept.vae.register_to_config(force_upcast=False)
    assert not kept.decode(Z).isfinite().all()


def test_a_pipeline_in_float16_decodes_as_one_in_float32():
    process = Process(shape=(4, 8, 8), classes=1000, dropout=0.1)
    exact, half = (
        quiet(DiffcorePipeline.of(Denoiser(dit(out_channels=4), process), vae=overflowing()))
        for _ in range(2)
    )
    half.to(torch.float16)
    arguments = {"seeds": [0], "class_labels": [3], "num_inference_steps": 2, "output_type": "pt"}
    expected, actual = exact(**arguments).images, half(**arguments).images
    assert actual.isfinite().all()
    assert (actual - expected).abs().mean() < 0.02


class OtherDevice(nn.Module):
    """A VAE on another device, which records what it is passed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device="meta", dtype=torch.bfloat16))
        self.config, self.seen = {}, []

    def decode(self, z):
        self.seen.append((z.device.type, z.dtype))
        return (torch.zeros(z.shape),)

    def encode(self, image):
        return self.decode(image)


@pytest.mark.parametrize("offloaded", (False, True))
def test_tensors_are_moved_to_the_device_of_the_vae_and_back(offloaded):
    model = OtherDevice()
    if offloaded:  # accelerate keeps the weights elsewhere between the calls
        model._hf_hook = SimpleNamespace(execution_device="meta")
        model.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    for result in (Latents(model).decode(Z), Latents(model).encode(IMAGE)):
        assert (result.device.type, result.dtype) == ("cpu", torch.float32)
    assert model.seen == [("meta", torch.bfloat16)] * 2


@torch.no_grad()
def test_the_tiny_autoencoder_has_latents():
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    model = seeded(lambda: diffusers.AutoencoderTiny(**blocks, **counts))
    latents = Latents(model)
    z = latents.encode(IMAGE)
    assert latents.factor == 4
    assert torch.equal(z, model.encode(IMAGE).latents)
    assert torch.equal(latents.encode(IMAGE, seed()), z)  # it has no posterior
    assert torch.equal(latents.decode(z), model.decode(z).sample)
    assert torch.equal(Latents(torch.compile(model, backend="eager")).decode(z), latents.decode(z))
