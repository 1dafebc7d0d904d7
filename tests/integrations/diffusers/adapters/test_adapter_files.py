"""Files of adapters: diffusers loads what is written, every format comes back as it was, and merged
weights answer as the adapter does.
"""

from functools import partial

import diffusers
import pytest
import torch

from diffcore.integrations.diffusers.adapters.adapted_parts import adapt_parts
from diffcore.integrations.diffusers.adapters.extraction import extract_adapters
from diffcore.integrations.diffusers.adapters.files import (
    read_adapters,
    split_strength,
    write_adapters,
)
from diffcore.integrations.diffusers.adapters.low_rank import LowRank
from diffcore.integrations.diffusers.loading.folder import read_folder
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.folder import merge_into_pipeline
from tests.helpers import text_networks

FAMILIES = {
    "sd": (text_networks.sd, partial(diffusers.DDIMScheduler, steps_offset=1, clip_sample=False)),
    "sdxl": (text_networks.sdxl, diffusers.EulerDiscreteScheduler),
    "sd3": (text_networks.sd3, diffusers.FlowMatchEulerDiscreteScheduler),
    "flux": (text_networks.flux, diffusers.FlowMatchEulerDiscreteScheduler),
}
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.2",
    "add_q_proj",
    "add_k_proj",
    "q_proj",
    "out_proj",
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.thorough if name == "sdxl" else ())
        for name in FAMILIES
    ],
)
def pipeline(request, tmp_path_factory):
    """The index of a family's pipeline."""
    make, scheduler = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    make(scheduler()).save_pretrained(folder)
    return PipelineIndex(folder)


def random_adapters(index, targets=TARGETS, dora=False, parts=("text_encoder",), rank=0, seed=0):
    """Changes in each layer of the network and of text encoders; rank 0: of other ranks and α."""
    torch.manual_seed(seed)
    adapters = {}
    for part in (index.network_name, *parts):
        for name, module in index.read_architecture(part).named_modules():
            if not any(name.endswith(f".{target}") for target in targets):
                continue
            size = rank or 1 + len(name) % 3
            rows, columns = module.weight.flatten(1).shape
            change = LowRank(
                0.3 * torch.randn(size, columns),
                torch.randn(rows, size),
                1.5 * size if rank or "to_q" in name else 2.0,
                torch.rand(rows) + 0.5 if dora else None,
            )
            if module.weight.ndim == 4:
                down, up = change.down[..., None, None], change.up[..., None, None]
                change = change._replace(down=down, up=up)
            adapters.setdefault(part, {})[name] = change
    return adapters


def in_blocks(adapters):
    """Without the single blocks of Flux, whose width diffusers' reader of kohya files fixes."""
    return {
        part: {name: change for name, change in changes.items() if "single_" not in name}
        for part, changes in adapters.items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for part, changes in expected.items():
        assert found[part].keys() == changes.keys()
        for name, change in changes.items():
            other = found[part][name]
            assert other.rank == change.rank, name
            torch.testing.assert_close(other.delta(), change.delta(), rtol=1e-6, atol=1e-6)
            if change.magnitude is not None:
                assert torch.equal(other.magnitude, change.magnitude)


def fused_weights(index, file):
    """The weights of a pipeline into which diffusers itself has loaded and fused a file."""
    pipe = getattr(diffusers, index.content["_class_name"]).from_pretrained(index.folder)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora([name for name in pipe._lora_loadable_modules if hasattr(pipe, name)])
    pipe.unload_lora_weights()
    return pipe


def assert_fused_equals_merged(index, file, adapters, folder):
    merge_into_pipeline(folder, index, [(adapters, 1.0)])
    merged, pipe = PipelineIndex(folder), fused_weights(index, file)
    for part, changes in adapters.items():
        expected, before = merged.read(part), index.read(part)
        for name in changes:
            found = getattr(pipe, part).get_submodule(name).weight
            weight = expected.get_submodule(name).weight
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5, msg=name)
            assert not torch.allclose(weight, before.get_submodule(name).weight)


def test_diffusers_loads_what_is_written_and_fuses_it_to_the_merged_weights(pipeline, tmp_path):
    adapters = random_adapters(pipeline)
    write_adapters(tmp_path / "a.safetensors", adapters, pipeline, "diffusers")
    assert_fused_equals_merged(pipeline, tmp_path / "a.safetensors", adapters, tmp_path / "merged")


def test_diffusers_loads_the_file_for_kohya(pipeline, tmp_path):
    if pipeline.content["_class_name"] == "StableDiffusion3Pipeline":
        pytest.skip("diffusers reads no kohya files of this family")
    # diffusers mistakes the names of layers with another α, and Flux' text encoders.
    parts = () if "Flux" in pipeline.content["_class_name"] else ("text_encoder",)
    adapters = in_blocks(random_adapters(pipeline, parts=parts, rank=2))
    write_adapters(tmp_path / "a.safetensors", adapters, pipeline, "kohya")
    assert_fused_equals_merged(pipeline, tmp_path / "a.safetensors", adapters, tmp_path / "merged")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_from_every_format_as_it_was(pipeline, tmp_path, dora):
    encoders = sorted(name for name in pipeline.parts if name.startswith("text_encoder"))
    targets = TARGETS[:4] if dora else TARGETS
    adapters = random_adapters(pipeline, targets, dora, () if dora else encoders)
    expected = adapters = in_blocks(adapters) if dora else adapters
    for form in ("diffusers", "kohya", "comfyui", "diffusers"):
        file = tmp_path / f"{form}.safetensors"
        write_adapters(file, adapters, pipeline, form)
        adapters = read_adapters(file, pipeline)
        assert_same(adapters, expected)


def test_extraction_at_full_rank_is_the_whole_change(pipeline, tmp_path):
    adapters = random_adapters(pipeline, parts=())
    merge_into_pipeline(tmp_path / "tuned", pipeline, [(adapters, 0.7)])
    tuned = PipelineIndex(tmp_path / "tuned")
    found, share = extract_adapters(tuned, pipeline, 64, TARGETS[:-2])
    assert share == pytest.approx(1.0)
    merge_into_pipeline(tmp_path / "again", pipeline, [(found, 1.0)])
    network = PipelineIndex(tmp_path / "again").read(pipeline.network_name)
    expected = tuned.read(pipeline.network_name).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    _, share = extract_adapters(tuned, pipeline, 1, TARGETS[:-2])
    assert 0.3 < share < 0.999


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_with_strengths_are_those_of_set_adapters(pipeline, tmp_path, dora):
    strengths, files = {"one": 0.8, "two": -0.5}, []
    for number, form in enumerate(("diffusers", "comfyui")):
        parts = () if dora else ("text_encoder",)
        adapters = in_blocks(random_adapters(pipeline, TARGETS[:4], dora, parts, seed=number))
        files.append(tmp_path / f"{form}.safetensors")
        write_adapters(files[-1], adapters, pipeline, form)
        write_adapters(tmp_path / f"{number}.safetensors", adapters, pipeline, "diffusers")
    pipe = getattr(diffusers, pipeline.content["_class_name"]).from_pretrained(pipeline.folder)
    for number, name in enumerate(strengths):
        pipe.load_lora_weights(tmp_path, weight_name=f"{number}.safetensors", adapter_name=name)
    pipe.set_adapters(list(strengths), list(strengths.values()))
    texts = [f"{file}={value}" for file, value in zip(files, strengths.values(), strict=True)]
    found = adapt_parts(read_folder(pipeline.folder), pipeline.folder, texts)
    assert found.scheduler["_class_name"] == pipeline.scheduler["_class_name"]
    merged, compared = found.pipeline(), 0
    for part in (pipeline.network_name, *(() if dora else ("text_encoder",))):
        before = pipeline.read(part)
        for name, layer in getattr(pipe, part).named_modules():
            if not hasattr(layer, "lora_A") or not layer.lora_A:
                continue
            linear = getattr(merged, part).get_submodule(name)
            x = torch.randn(3, linear.in_features)
            torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-5, msg=name)
            assert not torch.allclose(linear.weight, before.get_submodule(name).weight)
            compared += 1
    assert compared >= 4


def test_a_strength_is_finite():
    assert split_strength("a=b=0.5") == ("a=b", 0.5)
    assert split_strength("a=b") == ("a=b", 1.0)
    with pytest.raises(ValueError, match="lora is a=nan, expected a finite strength"):
        split_strength("a=nan")
