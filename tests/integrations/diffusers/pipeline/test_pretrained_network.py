"""A pipeline's network to train on: its weights, or an adapter beside them, and the scheduler that
is saved with it.
"""

import re
import shutil

import diffusers
import pytest
import torch

from diffcore.core.process import Process, TimeConditioning
from diffcore.integrations.diffusers import DiffcoreScheduler, LoRA, PretrainedNetwork
from diffcore.integrations.diffusers.adapters.files import ADAPTER, read_adapters
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.pipeline.folder import merge_into_pipeline
from diffcore.integrations.diffusers.pipeline.trained_scheduler import build_scheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    describe_process,
    read_scheduler_config,
)
from diffcore.schedules import Cosine, Discrete, Flow, Shifted, ZeroTerminalSNR
from tests.helpers.captioned_images import OLD, write_pipeline
from tests.helpers.damaged_folders import edit_json
from tests.helpers.tiny_pipelines import dit_pipeline

X, TIME, STATES = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 12, 8)
INDEX = TimeConditioning("index", 1000.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")


@torch.no_grad()
def answer(network):
    return network(X, TIME, encoder_hidden_states=STATES)


def test_it_answers_as_the_pipelines_network_and_trains_all_of_it(folder):
    made = PretrainedNetwork(str(folder))
    assert torch.equal(answer(made), PipelineIndex(folder).read("unet")(X, TIME, STATES).sample)
    assert all(value.requires_grad for value in made.parameters())
    assert set(made.state_dict()) == {f"network.{name}" for name in made.network.state_dict()}


def test_the_weights_that_it_replaces_are_not_read_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipeline")
    made = PretrainedNetwork(str(tmp_path / "pipeline"))
    shutil.copytree(folder / "scheduler", tmp_path / "run" / "scheduler")
    for path in (tmp_path / "pipeline" / "unet").glob("*.safetensors"):
        path.unlink()
    assert made.exported_parts(tmp_path / "run").network is made.network


def test_the_mean_of_a_network_that_also_outputs_a_variance(tmp_path):
    dit_pipeline(diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    made, labels = PretrainedNetwork(str(tmp_path)), torch.tensor([1, 2])
    expected = made.network(X, TIME, class_labels=labels).sample[:, :4]
    assert torch.equal(made(X, TIME, class_labels=labels), expected)


def test_a_learned_variance_is_an_output_if_the_network_has_it(folder, tmp_path):
    dit_pipeline(diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    made, labels = PretrainedNetwork(tmp_path, variance="learned"), torch.tensor([1, 2])
    assert torch.equal(
        made(X, TIME, class_labels=labels), made.network(X, TIME, class_labels=labels).sample
    )
    with pytest.raises(ValueError, match=r"outputs no variance: leave process\.variance out"):
        PretrainedNetwork(folder, variance="learned")


def test_the_state_of_an_adapter_is_the_adapter_alone(folder):
    torch.manual_seed(0)
    made = PretrainedNetwork(str(folder), LoRA(rank=2, alpha=6))
    base = PretrainedNetwork(str(folder))
    trained = {name for name, value in made.named_parameters() if value.requires_grad}
    assert set(made.state_dict()) == trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert torch.equal(answer(made), answer(base))  # B is 0
    state = {name: torch.randn_like(value) for name, value in made.state_dict().items()}
    made.load_state_dict(state)
    assert not torch.allclose(answer(made), answer(base))
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict(dict(list(state.items())[1:]))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made.load_state_dict(state | {"network.other": X})
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = (state[f"network.{name}.lora_{part}.default.weight"] for part in "AB")
    layer, plain = made.network.get_submodule(name), base.network.get_submodule(name)
    features = torch.randn(3, plain.in_features)
    torch.testing.assert_close(layer(features), plain(features) + 6 / 2 * features @ down.T @ up.T)


def test_without_alpha_the_factor_is_one_and_only_the_adapter_is_trained(folder):
    made = PretrainedNetwork(str(folder), LoRA(rank=2))
    layer = made.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert layer.scaling == {"default": 1.0}
    trained = [name for name, value in made.named_parameters() if value.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_the_first_adapter_is_a_function_of_the_seed(folder):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        state = PretrainedNetwork(str(folder), LoRA(2)).state_dict()
        states.append(torch.cat([value.flatten() for value in state.values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank is -1, expected 1 or more, or 0 to train all weights"),
        ({"rank": 2, "alpha": -1}, "alpha is -1 and targets are"),
        ({"rank": 2, "targets": []}, r"targets are \[\], expected"),
        ({"rank": 2, "targets": ["to_w"]}, r"no layer of UNet2DConditionModel ends in to_w"),
        ({"rank": 2, "targets": ["to_q", "_v"]}, r"ends in _v: correct the targets"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PretrainedNetwork(str(folder), LoRA(**options))


def test_without_peft_an_adapter_is_refused_with_the_remedy(folder, monkeypatch):
    monkeypatch.setattr(
        "diffcore.integrations.diffusers.adapters.lora.has_extra", lambda name: False
    )
    with pytest.raises(ValueError, match=r"LoRA .* not installed: pip install 'diffcore\[lora\]'"):
        PretrainedNetwork(str(folder), LoRA(2))


def test_an_adapter_that_diffusers_would_not_load_is_refused_before_it_is_trained(folder, tmp_path):
    dit_pipeline(diffusers.DDIMScheduler()).save_pretrained(tmp_path / "dit")
    with pytest.raises(
        ValueError, match="diffusers loads no LoRA into a DiTPipeline: train all weights"
    ):
        PretrainedNetwork(str(tmp_path / "dit"), LoRA(2))
    shutil.copytree(folder, tmp_path / "other")
    edit_json(tmp_path / "other/model_index.json", _class_name="logging")
    with pytest.raises(ValueError, match="holds a logging, expected a pipeline of diffusers"):
        PretrainedNetwork(str(tmp_path / "other"), LoRA(2))


def test_a_folder_without_pipeline_or_of_text_by_label_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is missing: expected the folder of a diffusers pipeline"):
        PretrainedNetwork(str(tmp_path))
    with pytest.raises(
        ValueError,
        match="is conditioned on text, not on labels: sample its pipeline/ with --prompt",
    ):
        PretrainedNetwork(str(folder))(X, TIME, class_labels=torch.tensor([0, 1]))


# The scheduler that is saved


LINEAR = Discrete("scaled_linear", 1000, 0.00085, 0.012)
BLEND = TimeConditioning("blend", 1000.0)
SD3 = Shifted.by_time_shift(Flow(), 3.0)


@pytest.mark.parametrize(
    ("config", "described", "kind"),
    [
        (diffusers.PNDMScheduler(**OLD), (LINEAR, "epsilon", INDEX), diffusers.DDIMScheduler),
        (
            diffusers.PNDMScheduler(**OLD),
            (ZeroTerminalSNR(LINEAR), "v_prediction", INDEX),
            diffusers.DDIMScheduler,
        ),
        (
            diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
            (SD3, "flow_prediction", BLEND),
            diffusers.FlowMatchHeunDiscreteScheduler,
        ),
        (
            diffusers.PNDMScheduler(**OLD),
            (SD3, "flow_prediction", BLEND),
            diffusers.FlowMatchEulerDiscreteScheduler,
        ),
        (diffusers.PNDMScheduler(**OLD), (SD3, "v_prediction", BLEND), DiffcoreScheduler),
    ],
    ids=["table", "zero SNR", "flow", "another flow", "flow that predicts v"],
)
def test_the_saved_scheduler_describes_the_process(tmp_path, config, described, kind):
    process = Process(*described, shape=(4, 8, 8), sigma_data=1.0)
    build_scheduler(read_scheduler_config(config), process).save_pretrained(tmp_path)
    found = kind.from_pretrained(tmp_path)
    assert type(found) is kind
    schedule, *others = describe_process(read_scheduler_config(found))[:3]
    assert others == [process.prediction, process.time]
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.logsnr(t), process.schedule.logsnr(t), rtol=1e-12, atol=1e-12
    )
    if kind is diffusers.DDIMScheduler:
        assert (found.config.timestep_spacing, found.config.set_alpha_to_one) == ("trailing", True)
        assert found.config.rescale_betas_zero_snr == (described[1] == "v_prediction")


def test_a_schedule_that_is_no_table_is_saved_as_one(tmp_path):
    process = Process(Cosine(), "v_prediction", INDEX, shape=(4, 8, 8), sigma_data=1.0)
    build_scheduler(read_scheduler_config(diffusers.PNDMScheduler(**OLD)), process).save_pretrained(
        tmp_path
    )
    found = describe_process(
        read_scheduler_config(diffusers.DDIMScheduler.from_pretrained(tmp_path))
    )
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(found.schedule.logsnr(t), Cosine().logsnr(t), rtol=0, atol=1e-9)
    assert found[1:3] == ("v_prediction", INDEX)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "lokr"])
def test_diffusers_loads_every_kind_of_adapter_that_it_knows(folder, tmp_path, kind):
    torch.manual_seed(0)
    ranks = {"mid_block.*to_q": 3}
    made = PretrainedNetwork(str(folder), LoRA(rank=2, alpha=3, kind=kind, ranks=ranks))
    before = answer(made)
    state = {name: 0.3 * torch.randn_like(value) for name, value in made.state_dict().items()}
    made.load_state_dict(state)
    made.export(tmp_path, Process(Discrete(), shape=(4, 8, 8), prediction="epsilon"))
    network = PipelineIndex(folder).read("unet")
    network.load_lora_adapter(tmp_path, prefix="unet", weight_name=ADAPTER)
    assert not torch.allclose(answer(made), before, rtol=1e-2)
    torch.testing.assert_close(network(X, TIME, STATES).sample, answer(made), rtol=1e-5, atol=1e-5)


def test_overlapping_patterns_of_ranks_are_loaded_and_merged_as_trained(folder, tmp_path):
    torch.manual_seed(0)
    # Sorted, the pattern of mid_block comes first, and gives attn1.to_q another rank.
    ranks = {"to_[qk]": 5, "mid_block.*": 3, "attn1.*": 4}
    made = PretrainedNetwork(str(folder), LoRA(rank=2, alpha=3, ranks=ranks))
    layer = made.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert layer.r == {"default": 5}
    made.load_state_dict({k: 0.3 * torch.randn_like(v) for k, v in made.state_dict().items()})
    made.export(tmp_path, Process(Discrete(), shape=(4, 8, 8), prediction="epsilon"))
    index = PipelineIndex(folder)
    network = index.read("unet")
    network.load_lora_adapter(tmp_path, prefix="unet", weight_name=ADAPTER)
    torch.testing.assert_close(network(X, TIME, STATES).sample, answer(made), rtol=1e-5, atol=1e-5)
    merge_into_pipeline(tmp_path / "merged", index, [(read_adapters(tmp_path, index), 1.0)])
    merged = PipelineIndex(tmp_path / "merged").read("unet")
    torch.testing.assert_close(merged(X, TIME, STATES).sample, answer(made), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answer(made), index.read("unet")(X, TIME, STATES).sample, rtol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_the_merged_pipeline_answers_as_the_adapter(folder, tmp_path, kind):
    torch.manual_seed(0)
    ranks = {"mid_block.*to_q": 5}
    made = PretrainedNetwork(str(folder), LoRA(rank=3, alpha=2, kind=kind, ranks=ranks))
    state = {name: 0.3 * torch.randn_like(value) for name, value in made.state_dict().items()}
    made.load_state_dict(state)
    made.export(tmp_path, Process(Discrete(), shape=(4, 8, 8), prediction="epsilon"))
    index = PipelineIndex(folder)
    merge_into_pipeline(tmp_path / "merged", index, [(read_adapters(tmp_path, index), 1.0)])
    merged = PipelineIndex(tmp_path / "merged").read("unet")
    torch.testing.assert_close(merged(X, TIME, STATES).sample, answer(made), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answer(made), index.read("unet")(X, TIME, STATES).sample, rtol=1e-2)


@pytest.mark.parametrize(("base", "bound"), [("bf16", 0.02), ("fp8", 0.1)])
def test_a_frozen_base_in_fewer_bits_trains_a_float32_adapter(folder, tmp_path, base, bound):
    torch.manual_seed(0)
    exact = PretrainedNetwork(str(folder), LoRA(rank=2))
    torch.manual_seed(0)
    made = PretrainedNetwork(str(folder), LoRA(rank=2), base=base).train()
    state = {name: 0.3 * torch.randn_like(value) for name, value in exact.state_dict().items()}
    for network in (exact, made):
        network.load_state_dict(state)
    output = made(X, TIME, encoder_hidden_states=STATES)
    expected = exact(X, TIME, encoder_hidden_states=STATES)
    assert output.dtype == torch.float32
    difference = (output - expected).norm() / expected.norm()
    assert 1e-4 < difference < bound
    gradients = []
    for network, out in ((made, output), (exact, expected)):
        out.square().mean().backward()
        trained = [value for value in network.parameters() if value.requires_grad]
        assert {value.dtype for value in trained} == {torch.float32}
        gradients.append(torch.cat([value.grad.flatten() for value in trained]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 1 - bound
    frozen = [value for value in made.parameters() if not value.requires_grad]
    stored = sum(value.nbytes for value in frozen)
    assert stored < (0.51 if base == "bf16" else 0.35) * sum(
        4 * value.numel() for value in exact.parameters() if not value.requires_grad
    )
    made.export(tmp_path, Process(Discrete(), shape=(4, 8, 8), prediction="epsilon"))
    sampled = made.exported_parts(tmp_path).network
    torch.testing.assert_close(sampled(X, TIME, STATES).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "bf16"}, "base is bf16, but all weights are trained, which needs float32"),
        ({"base": "int3", "lora": LoRA(2)}, "base is 'int3', expected one of float32, bf16, fp8"),
    ],
)
def test_a_base_that_cannot_be_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PretrainedNetwork(str(folder), **options)


@pytest.mark.parametrize(
    ("is_installed", "message"),
    [
        (False, r"nf4 .* needs the package 'bitsandbytes', which is not"),
        (True, "base is nf4, which needs a GPU, and there is none: use bf16 or fp8"),
    ],
)
def test_a_base_in_4_bits_without_its_package_or_a_gpu_is_refused(
    folder, monkeypatch, is_installed, message
):
    module = "diffcore.integrations.diffusers.loading.frozen_base"
    monkeypatch.setattr(f"{module}.has_extra", lambda name: is_installed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        PretrainedNetwork(str(folder), LoRA(2), base="nf4")


def test_an_adapter_of_hadamard_products_trains(folder):
    made = PretrainedNetwork(str(folder), LoRA(rank=2, kind="loha", dropout=0.1))
    assert all(".hada_w" in name for name in made.state_dict())
    answer_with_gradient = made.train()(X, TIME, encoder_hidden_states=STATES)
    answer_with_gradient.square().mean().backward()
    assert any(value.grad is not None and value.grad.any() for value in made.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "kind": "lora2"}, "kind is 'lora2', expected one of"),
        ({"rank": 2, "dropout": 1.0}, "dropout is 1.0"),
        ({"rank": 2, "ranks": {"(": 3}}, "no regular expression"),
        ({"rank": 2, "ranks": {"to_q": 0}}, "ranks has 0 for to_q"),
        ({"rank": 0, "ranks": {"to_q": 4}}, "rank is 0"),
        ({"rank": 2, "ranks": {"to_x": 4}}, "'to_x', which matches no adapted layer"),
        (
            {"rank": 10**6},
            "rank is 1000000, but the largest adapted layer has 16 inputs or outputs",
        ),
        ({"rank": 9, "targets": ["conv_in"]}, "expected at most 8"),
        ({"rank": 9, "targets": ["attn2.to_k"]}, "expected at most 8"),
        ({"rank": 2, "ranks": {"to_q": 99}}, "the rank of 'to_q' is 99, but the largest"),
        ({"rank": 2, "ranks": {"conv_in": 4}}, "'conv_in', which matches no adapted layer"),
    ],
)
def test_options_of_an_adapter_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PretrainedNetwork(str(folder), LoRA(**options))
