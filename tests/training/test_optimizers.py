"""Optimizers by import path, groups of parameters, and optimizers with two sets of weights."""

from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from diffcore.io.extras import MissingExtraError
from diffcore.io.parser import ComponentParser
from diffcore.run import OptimizerFactory
from diffcore.training.averages.ema import Decay
from diffcore.training.data import Digits
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.optimization.optimizers import (
    build_optimizer,
    evaluation_weights,
    group_parameters,
    set_learning_rate,
)
from diffcore.training.optimization.quantised_state import is_quantised
from diffcore.training.reports.validation import Validation
from tests.helpers.training_runs import (
    LabelRecorder,
    assert_equal_checkpoints,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    train,
)
from tests.training.test_compute import dit, unet

AdamWScheduleFree = pytest.importorskip("schedulefree").AdamWScheduleFree
FREE = {"optimizer": partial(AdamWScheduleFree, weight_decay=0.01)}


def parse(path: str) -> OptimizerFactory:
    """The optimizer factory that settings describe by an import path."""
    parser = ComponentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerFactory)
    return parser.instantiate(parser.parse_args([f"--optimizer={path}"])).optimizer


def test_settings_name_schedule_free_optimizers_by_their_path():
    network = LabelRecorder()
    optimizer = parse("schedulefree.AdamWScheduleFree")(network.parameters(), 1e-3)
    assert isinstance(optimizer, AdamWScheduleFree)


@pytest.mark.parametrize(
    "path",
    ["bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit", "schedulefree.SGDScheduleFree"],
)
def test_an_optimizer_that_is_not_installed_is_named_with_the_command(path, monkeypatch):
    monkeypatch.setattr("diffcore.io.trust.has_extra", lambda package: False)
    with pytest.raises((MissingExtraError, ValueError), match=r"pip install 'diffcore\[optimizers"):
        parse(path)


@pytest.mark.parametrize(
    "path", ["schedulefree.wrap_schedulefree", "torchao.quantization.Int8Tensor"]
)
def test_other_objects_of_these_packages_are_refused(path):
    with pytest.raises(ValueError, match=r"not allowed|Expected"):
        parse(path)


# Groups of parameters


class Plain(nn.Module):
    """Each type of parameter once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.table = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm((2, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def decayed_names(module: nn.Module) -> set[str]:
    names = {id(value): name for name, value in module.named_parameters()}
    decayed, others = group_parameters(module)
    assert others["weight_decay"] == 0
    grouped = [id(value) for group in (decayed, others) for value in group["params"]]
    trained = [id(value) for value in module.parameters() if value.requires_grad]
    assert sorted(grouped) == sorted(trained)
    return {names[id(value)] for value in decayed["params"]}


def test_weights_of_layers_decay_and_norms_biases_and_tables_do_not():
    expected = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert decayed_names(Plain()) == expected


@pytest.mark.parametrize("build", [unet, dit], ids=["UNet2DModel", "DiT"])
def test_in_networks_of_diffusers_the_layers_with_matrices_decay(build):
    network = build()
    layers = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert decayed_names(network) == layers


def test_a_table_that_is_also_an_output_layer_does_not_decay():
    network = nn.Module()
    network.table, network.output = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
    network.output.weight = network.table.weight
    [group] = group_parameters(network)
    assert group["weight_decay"] == 0


def test_groups_are_stored_by_name_and_a_run_resumes_with_them_only(tmp_path):
    options = {
        "decay_only_matrices": True,
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.5),
    }
    train(tmp_path / "whole", **options)
    part = make_trainer(tmp_path / "part", **options, save_every=2, keep=1)
    crash_after(part, 2)
    with pytest.raises(ValueError, match=r"another decay_only_matrices \(True, now False\)"):
        replace(part, resume=True, decay_only_matrices=False).train()
    state = replace(part, resume=True, save_every=1000).train()
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")
    from diffcore.training.checkpoints import checkpoint

    groups = checkpoint.read(tmp_path / "part/checkpoints/step-00000006").state["groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert groups[0]["params"] == [
        "time.weight",
        "layers.1.weight",
        "layers.4.weight",
        "image.weight",
    ]
    assert len(groups[1]["params"]) == len(list(state.network.parameters())) - 4


def test_an_optimizer_without_weight_decay_has_no_such_groups():
    with pytest.raises(ValueError, match=r"the optimizer Rprop has no weight decay"):
        build_optimizer(torch.optim.Rprop, [LabelRecorder()], LearningRate(), True)


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(1.0))
    tensor = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert float(tensor) == 0.25


# Two sets of weights


def test_a_schedule_free_run_averages_and_exports_the_weights_of_evaluation(tmp_path):
    state = train(tmp_path, **FREE, ema=Decay(0.0), network=partial(LabelRecorder, dropout=0.2))
    optimizer, parameters = state.optimizer.optimizer, dict(state.network.named_parameters())
    y = {name: value.detach().clone() for name, value in parameters.items()}
    stored = read_checkpoint(tmp_path)
    assert all(torch.equal(stored["model.safetensors"][name], value) for name, value in y.items())
    optimizer.eval()
    for name, x in parameters.items():
        assert torch.equal(stored["ema.safetensors"][name], x)
    assert any(not torch.equal(x, y[name]) for name, x in parameters.items())


def test_a_schedule_free_run_with_reports_resumes_bit_for_bit(tmp_path):
    held_out = Validation(Digits(split="test"), every=2, items=20)
    train(tmp_path / "whole", **FREE)
    reported = {"validation": held_out, "sample_every": 2, "sample_steps": 2}
    part = make_trainer(tmp_path / "part", **FREE, **reported, save_every=3)
    crash_after(part, 3)
    replace(part, resume=True).train()
    found, expected = (read_checkpoint(tmp_path / name) for name in ("part", "whole"))
    assert_equal_checkpoints(found, expected)
    assert read_reports(tmp_path / "part") == read_reports(tmp_path / "whole")


def test_the_held_out_loss_of_the_current_weights_is_that_of_the_weights_of_evaluation(tmp_path):
    held_out = Validation(Digits(split="test"), every=6, items=20)
    train(tmp_path, **FREE, ema=Decay(0.0), validation=held_out)
    from diffcore.training.reports.metrics import Metrics

    [line] = Metrics(tmp_path / "validation.jsonl").reports()
    assert line["loss"] == line["loss_current"]


def test_the_weights_at_which_gradients_are_taken_return_bit_for_bit_after_an_error():
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    optimizer = build_optimizer(AdamWScheduleFree, [network], LearningRate(0.1), False)
    for _ in range(3):
        network(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = network.weight.detach().clone()
    with suppress(KeyError), evaluation_weights(optimizer):
        assert not torch.equal(network.weight, before)
        raise KeyError
    assert torch.equal(network.weight, before)
    optimizer.step()  # is in training mode


def test_the_warmup_of_a_run_is_that_of_the_schedule_free_optimizer(tmp_path):
    ours = train(tmp_path / "ours", **FREE, lr=LearningRate(1e-2, warmup=4))
    theirs = {"optimizer": partial(FREE["optimizer"], warmup_steps=4)}
    state = train(tmp_path / "theirs", **theirs, lr=LearningRate(1e-2, warmup=0))
    for value, other in zip(ours.network.parameters(), state.network.parameters(), strict=True):
        assert torch.equal(value, other)


def test_a_decay_of_the_learning_rate_is_refused_for_a_schedule_free_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"set lr.shape: constant"):
        train(tmp_path, **FREE, lr=LearningRate(shape="cosine"))


# 8-bit states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_an_8_bit_optimizer_resumes_bit_for_bit(tmp_path, package):
    optimizer = pytest.importorskip(f"{package}.optim").AdamW8bit
    options = {"optimizer": optimizer, "decay_only_matrices": True, "steps": 4, "keep": 1}
    if package == "bitsandbytes":
        options["optimizer"] = partial(optimizer, min_8bit_size=1024)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        train(tmp_path / "whole", **options)
        part = make_trainer(tmp_path / "part", **options, save_every=2)
        crash_after(part, 2)
        state = replace(part, resume=True, save_every=4).train()
    found, expected = (read_checkpoint(tmp_path / name, 4) for name in ("part", "whole"))
    assert_equal_checkpoints(found, expected)
    dtypes = {value.dtype for value in expected["training.safetensors"].values()}
    assert torch.uint8 in dtypes
    assert is_quantised(state.optimizer.optimizer)
