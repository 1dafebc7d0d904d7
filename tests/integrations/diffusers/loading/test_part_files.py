"""The files of a pipeline's part are checked before the part is loaded."""

import json

import pytest

from diffcore.integrations.diffusers import from_diffusers
from diffcore.integrations.diffusers.loading.part_files import check_files, check_size
from diffcore.io.files import check_links
from tests.helpers.text_networks import ddim
from tests.helpers.tiny_pipelines import dit, dit_pipeline, unet


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "code.Net"}}, "names code in auto_map"),
        ("config.json", {"text_config": {"_attn_implementation": "owner/kernel"}}, "owner/kernel"),
        ("config.json", {"attn_implementation": {"text_config": "owner/kernel"}}, "owner/kernel"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "merge the adapter"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x.bin"}}, "names 'x.bin'"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"a": "../x.safetensors"}},
            r"names '\.\./",
        ),
        ("model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "names '/x"),
        ("model.safetensors.index.json", {"weight_map": {"a": 3}}, "names 3"),
        ("model.safetensors.index.json", {}, "names None"),
    ],
)
def test_files_that_name_code_pickles_or_other_folders_are_refused(
    tmp_path, name, content, message
):
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        check_files(tmp_path)


def test_usual_files_are_accepted(tmp_path):
    write(tmp_path, "config.json", {"_attn_implementation": "sdpa", "auto_map": None})
    write(tmp_path, "tokenizer_config.json", {"special_tokens_map_file": "./special.json"})
    write(tmp_path, "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    write(tmp_path, "pytorch_model.bin.index.json", {"weight_map": {"a": "model-1.bin"}})
    check_files(tmp_path)


def test_a_network_of_more_than_twice_the_size_of_its_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffcore.integrations.diffusers.loading.part_files.SLACK", 0)
    network, larger = unet(), unet(block_out_channels=(32, 64))
    network.save_pretrained(tmp_path)
    check_size(tmp_path, lambda: type(network).from_config(network.config))
    with pytest.raises(
        ValueError, match=r"config.json: .* its safetensors hold [\d,]+: they do not"
    ):
        check_size(tmp_path, lambda: type(network).from_config(larger.config))


def test_the_snapshot_of_a_hub_is_a_folder_of_links_to_the_blobs_beside_it(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    dit_pipeline(ddim()).save_pretrained(snapshot)
    blobs.mkdir()
    path = snapshot / "transformer/diffusion_pytorch_model.safetensors"
    path.rename(blobs / "2")
    path.symlink_to("../../../blobs/2")
    check_links(snapshot)
    assert type(from_diffusers(snapshot).network) is type(dit())
    path.unlink()
    (tmp_path / "models--a--b/3").write_text("")
    path.symlink_to("../../../3")
    with pytest.raises(ValueError, match=r"safetensors is a link to ../../../3, which is outside"):
        from_diffusers(snapshot)
