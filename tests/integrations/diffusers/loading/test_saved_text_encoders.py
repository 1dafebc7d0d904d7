"""Prompts that the text encoders of a saved pipeline encode, and damaged folders of encoders."""

import shutil

import diffusers
import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import from_diffusers
from diffcore.sampling.generation import sample
from tests.helpers import text_networks
from tests.helpers.damaged_folders import UnpicklingBomb, edit_json
from tests.helpers.text_networks import ddim, flow
from tests.helpers.tiny_pipelines import relative_difference

TEXTS = ("a red cat", "two dogs")


@pytest.mark.parametrize("zeros", [True, False])
def test_a_saved_pipeline_encodes_its_prompts(tmp_path, zeros):
    saved = text_networks.sdxl(ddim(), force_zeros_for_empty_prompt=zeros)
    saved.save_pretrained(tmp_path)
    denoisers = [from_diffusers(source, prompts=TEXTS) for source in (saved, tmp_path)]
    states, again = (
        denoiser.network.prompts.tensors["encoder_hidden_states"] for denoiser in denoisers
    )
    torch.testing.assert_close(
        states, again
    )  # weights that lie elsewhere are multiplied in another order
    assert bool(states[2].any()) != zeros
    samples = [
        sample(denoiser, steps=2, seeds=[0], condition=[1], guidance=CFG(3.0)).x
        for denoiser in denoisers
    ]
    assert relative_difference(*samples) < 1e-5


def test_of_stable_diffusion_3_is_optional(tmp_path):
    saved = text_networks.sd3(flow())
    saved = diffusers.StableDiffusion3Pipeline(
        **saved.components | {"text_encoder_3": None, "tokenizer_3": None}
    )
    saved.save_pretrained(tmp_path)
    states, again = (
        from_diffusers(source, prompts=TEXTS).network.prompts.tensors
        for source in (saved, tmp_path)
    )
    for name, value in states.items():
        torch.testing.assert_close(value, again[name])


@pytest.fixture
def folder(tmp_path):
    text_networks.sd(ddim()).save_pretrained(tmp_path)
    return tmp_path


def pickled(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save(UnpicklingBomb(), folder / "text_encoder" / "pytorch_model.bin")


def remote(folder):
    (folder / "text_encoder" / "actual.py").write_text("raise SystemExit('the code was run')")
    edit_json(
        folder / "text_encoder" / "config.json",
        auto_map={"AutoModel": "actual.Encoder"},
        model_type="actual",
    )
    edit_json(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])


def unread(folder):
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


BROKEN = [
    (pickled, "text_encoder cannot be read .*; pickled weights are not opened, convert them first"),
    (
        remote,
        "names transformers.AutoModel as text_encoder, which is no model of diffusers",
    ),
    (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder cannot be read"),
    (unread, "tokenizer holds no tokenizer, expected one of vocab.json"),
    (
        lambda f: edit_json(f / "model_index.json", tokenizer=["transformers", "pipeline"]),
        "transformers.pipeline as tokenizer",
    ),
    (
        lambda f: edit_json(f / "model_index.json", text_encoder=[None, None]),
        "has no text_encoder: load it, or pass Prompts",
    ),
    (
        lambda f: edit_json(f / "model_index.json", _class_name="Mine"),
        "names the pipeline Mine, expected one of diffusers that",
    ),
    (
        lambda f: edit_json(f / "model_index.json", _class_name=["actual", "Mine"]),
        r"names the pipeline \['actual', 'Mine'\]",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_encoders_that_are_incomplete_or_hold_code_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        from_diffusers(folder, prompts=TEXTS)
    assert "\n" not in str(caught.value)
