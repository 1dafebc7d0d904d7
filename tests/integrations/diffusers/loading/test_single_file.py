"""A single checkpoint of the original code becomes the pipeline that it was written from."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffcore.integrations.diffusers.adapters.original_names import original_layers
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.single_file import (
    convert_single_file,
    download_pipeline,
    is_hub_id,
)
from tests.helpers import text_networks
from tests.helpers.damaged_folders import edit_json

UNET = {"norm1.": "in_layers.0.", "norm2.": "out_layers.0.", "conv_norm_out.": "out.0."}
VAE = [
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{1 - int(found[1])}.block."),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
]
"""Names of the two blocks of the tiny VAE -> the original names."""


def original_unet(unet):
    names = {parts[0]: name for name, parts in original_layers(unet).items()}
    for key, value in unet.state_dict().items():
        layer, _, ending = key.rpartition(".")
        name = f"{names.get(layer, layer)}.{ending}"
        if "attentions" not in key and "transformer" not in key:
            for ours, theirs in UNET.items():
                name = name.replace(ours, theirs)
        yield f"model.diffusion_model.{name}", value


def original_vae(vae):
    for key, value in vae.state_dict().items():
        name = key
        for pattern, replacement in VAE:
            name = re.sub(pattern, replacement, name)
        is_attention = "attn_1" in name and value.ndim == 2
        yield f"first_stage_model.{name}", value[..., None, None] if is_attention else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, its single checkpoint, and a folder with its configs and no weights."""
    folder = tmp_path_factory.mktemp("single")
    pipe = text_networks.sd(text_networks.ddim())
    pipe.save_pretrained(folder / "pipeline")
    encoder = pipe.text_encoder.state_dict().items()
    text = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder}
    tensors = dict(original_unet(pipe.unet)) | dict(original_vae(pipe.vae)) | text
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "a.safetensors"
    )
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder / "pipeline", folder / "config", ignore=weights)
    return folder


def test_the_checkpoint_becomes_the_pipeline_that_it_was_written_from(folder, tmp_path):
    converted = convert_single_file(folder / "a.safetensors", folder / "config", tmp_path)
    found, expected = PipelineIndex(converted), PipelineIndex(folder / "pipeline")
    assert found.scheduler == expected.scheduler
    for part in ("unet", "vae", "text_encoder"):
        state = expected.read(part).state_dict()
        result = found.read(part).state_dict()
        assert result.keys() == state.keys()
        assert all(torch.equal(result[name], value) for name, value in state.items())
    written = (converted / "model_index.json").stat().st_mtime_ns
    again = convert_single_file(folder / "a.safetensors", folder / "config", tmp_path)
    assert again == converted
    assert (converted / "model_index.json").stat().st_mtime_ns == written
    other = tmp_path / "config"
    shutil.copytree(folder / "config", other)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    changed = convert_single_file(folder / "a.safetensors", other, tmp_path)
    assert PipelineIndex(changed).scheduler["prediction_type"] == "v_prediction"
    assert changed != converted


def test_what_cannot_be_converted_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match="pickled weights are not opened"):
        convert_single_file(folder / "a.ckpt", folder / "config", tmp_path)
    with pytest.raises(ValueError, match=r"model_index.json is missing"):
        convert_single_file(folder / "a.safetensors", tmp_path / "none", tmp_path)
    shutil.copytree(folder / "config", tmp_path / "code")
    edit_json(tmp_path / "code/model_index.json", unet=["os", "system"])
    with pytest.raises(ValueError, match=r"names os.system as unet, .* code that comes with"):
        convert_single_file(folder / "a.safetensors", tmp_path / "code", tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be read as the StableDiffusionPipeline") as error:
        convert_single_file(tmp_path / "other.safetensors", folder / "config", tmp_path)
    assert "\n" not in str(error.value)


def test_an_id_on_a_hub_is_downloaded_without_pickles_and_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-1.5")
    (tmp_path / "owner").mkdir()
    assert not any(map(is_hub_id, ["owner/name-1.5", "/owner/name", "name", "./a/b", "a/b/c"]))
    calls = {}
    result = download_pipeline("a/b", lambda name, **options: calls.update(options) or "local")
    assert str(result) == "local"
    assert all(not pattern.endswith((".bin", ".py", "*")) for pattern in calls["allow_patterns"])

    def fail(name, **options):
        raise OSError("no\nroute")

    with pytest.raises(
        ValueError, match=r"pipeline is a/b, .* \(OSError: no route\): name a local"
    ):
        download_pipeline("a/b", fail)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_a_variant_is_read_in_float32(tmp_path, variant):
    pipe = text_networks.sd(text_networks.ddim())
    dtype = torch.float16 if variant == "fp16" else torch.bfloat16
    pipe.to(dtype).save_pretrained(tmp_path / "half", variant=variant)
    unet = PipelineIndex(tmp_path / "half").read("unet")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value.float()), name
