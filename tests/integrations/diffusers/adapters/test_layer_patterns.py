"""Patterns of ranks and of α: the rule is that of peft, in every reader."""

import json

import diffusers
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from diffcore.integrations.diffusers.adapters.files import METADATA, read_adapters, write_adapters
from diffcore.integrations.diffusers.adapters.layer_names import exact_pattern, find_pattern
from diffcore.integrations.diffusers.adapters.low_rank import LowRank, merge_adapters
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from tests.helpers import text_networks
from tests.helpers.captioned_images import write_pipeline

LAYERS = (
    "to_q",
    "mid.attn1.to_q",
    "mid.attn2.to_q",
    "up.0.attn1.to_out.0",
    "up.10.attn1.to_out.0",
    "proj_out",
    "blocks.0.proj_out",
    "xproj_out",
)
PATTERNS = (
    [],
    ["to_q"],
    ["mid.*", "to_q"],
    ["to_q", "mid.*"],
    [r".*attn1\..*", "up.0.*"],
    [r"attn[12]\.to_q"],
    ["0.attn1.to_out.0"],
    ["^proj_out", "proj_out"],
    ["to_out|to_q", "x?proj_out"],
)
ALPHAS = {"to_q": 5.0, r"mid_block.*attn1\..*": 7.0, "attn[12].*": 11.0}
"""Sorted, they would give other values."""


@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_pattern_of_a_layer_is_that_of_peft(patterns):
    for layer in LAYERS:
        expected = get_pattern_key(patterns, layer)
        assert (find_pattern(patterns, layer) or layer) == expected


def test_an_exact_pattern_matches_its_layer_alone():
    for layer in LAYERS:
        pattern = exact_pattern(layer, LAYERS)
        assert [name for name in LAYERS if find_pattern([pattern], name)] == [layer]


def test_a_pattern_that_is_no_regular_expression_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression .*correct the ranks"):
        find_pattern(["("], "to_q")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return PipelineIndex(write_pipeline(tmp_path_factory.mktemp("patterns") / "pipeline"))


CONFIGS = {
    "lora": LoraConfig(r=2, lora_alpha=3, init_lora_weights=False),
    "rslora": LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, use_rslora=True),
    "loha": LoHaConfig(r=2, alpha=3, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=3, init_weights=False),
    "lokr of full matrices": LoKrConfig(r=64, alpha=48, init_weights=False),
}


@pytest.mark.filterwarnings("ignore:LoRA module contains rank_pattern or alpha_pattern")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_alpha_of_each_layer_is_that_of_peft_whose_patterns_overlap(index, tmp_path, kind):
    config = CONFIGS[kind]
    config.target_modules = {"to_q", "to_v"}
    config.alpha_pattern = ALPHAS
    config.rank_pattern = {"mid_block.*": 4, "to_q": 3} if config.r == 2 else {}
    torch.manual_seed(0)
    network = inject_adapter_in_model(config, index.read("unet"))
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(network).items()}
    metadata = {f"unet.{k}": v for k, v in config.to_dict().items()}
    text = json.dumps(metadata, default=sorted)
    save_file(state, tmp_path / "a.safetensors", {"format": "pt", METADATA: text})
    changed = index.read("unet")
    adapters = read_adapters(tmp_path / "a.safetensors", index)
    merge_adapters(changed, [(adapters["unet"], 1.0)])
    for name in adapters["unet"]:
        layer = network.get_submodule(name)
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        weight = changed.get_submodule(name).weight
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_a_layer_whose_name_ends_other_names_keeps_its_rank_in_diffusers(tmp_path):
    text_networks.flux(diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "p")
    index = PipelineIndex(tmp_path / "p")
    network = index.read("transformer")
    torch.manual_seed(0)
    changes = {}
    for rank, name in enumerate(("single_transformer_blocks.0.proj_out", "proj_out"), 1):
        rows, columns = network.get_submodule(name).weight.shape
        changes[name] = LowRank(torch.randn(rank, columns), torch.randn(rows, rank), rank + 2.0)
    write_adapters(tmp_path / "a.safetensors", {"transformer": changes}, index, "diffusers")
    network.load_lora_adapter(tmp_path, prefix="transformer", weight_name="a.safetensors")
    for name, change in changes.items():
        found = network.get_submodule(name).get_delta_weight("default_0")
        torch.testing.assert_close(found, change.delta(), rtol=1e-5, atol=1e-5)
    assert read_adapters(tmp_path / "a.safetensors", index)["transformer"].keys() == changes.keys()
