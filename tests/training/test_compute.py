"""Compilation, activation checkpointing and channels-last change speed and memory only."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from diffcore.core.denoiser import extract_tensor
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.training.averages.ema import EMA, Decay
from diffcore.training.data import Digits
from diffcore.training.optimization.compute import Compute
from diffcore.training.reports.validation import Validation
from tests.helpers.products import sampled
from tests.helpers.tiny_pipelines import GREY_DIT, UNET
from tests.helpers.training_runs import (
    assert_equal_checkpoints,
    crash_after,
    make_trainer,
    read_checkpoint,
    train,
)

pytestmark = [  # dynamo warns where it traces functions of diffusers and gradients of activations
    pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
COMPILED = [Compute("network", "aot_eager"), Compute("blocks", "aot_eager")]
IDS = ["network", "blocks"]


def unet(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    grey = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 11}
    return UNet2DModel(**UNET | grey, dropout=dropout)


def dit(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**GREY_DIT | {"num_embeds_ada_norm": 10}, dropout=dropout)


class Residual(nn.Module):
    """Residual blocks in a ModuleList, as a user writes them."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(66, 64)
        self.labels = nn.Embedding(11, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(64) if norm else nn.LayerNorm(64),
                nn.Linear(64, 256),
                nn.SiLU(),
                nn.Dropout(dropout),
                nn.Linear(256, 64),
            )
            for _ in range(3)
        )

    def forward(self, x, time, class_labels=None):
        scaled = time[:, None] / 1000
        h = self.head(torch.cat([x.flatten(1), scaled, scaled**2], 1)) + self.labels(class_labels)
        for block in self.blocks:
            h = h + block(h)
        return h.view_as(x)


NETWORKS = {"UNet2DModel": unet, "DiT": dit, "own": Residual}


def gradients(network: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """The gradient of a loss, and the number of bytes that are stored for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    stored: dict[int, int] = {}

    def pack(value):
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return value

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = network(x, torch.full((4,), 500.0), class_labels=torch.arange(4))
        loss = extract_tensor(output).square().mean()
    weights = {value.untyped_storage().data_ptr() for value in network.parameters()}
    size = sum(size for address, size in stored.items() if address not in weights)
    loss.backward()
    return {name: value.grad for name, value in network.named_parameters()}, size


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_gives_the_same_gradients_from_fewer_stored_bytes(name, is_training):
    plain, checkpointed = (NETWORKS[name](dropout=0.3).train(is_training) for _ in range(2))
    names = list(plain.state_dict())
    Compute(checkpointing=True).apply(checkpointed)
    assert list(checkpointed.state_dict()) == names
    expected, all_bytes = gradients(plain)
    found, fewer_bytes = gradients(checkpointed)
    largest = max(value.abs().max() for value in expected.values() if value is not None)
    for key, value in expected.items():
        if value is not None:
            assert (found[key] - value).abs().max() <= 1e-6 * max(largest, 1)
    assert 0 < fewer_bytes < 0.6 * all_bytes


def compiled_graphs() -> tuple[int, int]:
    """Number of graphs that were compiled, and number of interruptions between graphs."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def count_graphs(folder, name: str, precision: str, checkpointing: bool) -> tuple[int, int]:
    """The graphs of a run with previews and held-out losses, which have other batch sizes."""
    compute = Compute("network", "eager", checkpointing=checkpointing)
    options = {"network": NETWORKS[name], "compute": compute, "precision": precision}
    held_out = Validation(Digits(split="test"), every=2, items=20)
    train(folder, **options, steps=4, sample_every=2, sample_steps=2, validation=held_out)
    return compiled_graphs()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_network_of_a_run_is_one_graph_that_is_compiled_once(
    tmp_path, dynamo, precision, checkpointing
):
    assert count_graphs(tmp_path, "own", precision, checkpointing) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "checkpointing"),
    sampled(["UNet2DModel", "DiT"], ["no", "bf16"], [False, True], count=3),
)
def test_networks_of_diffusers_are_one_graph(tmp_path, dynamo, name, precision, checkpointing):
    assert count_graphs(tmp_path, name, precision, checkpointing) == (1, 0)


def test_each_block_is_one_graph(tmp_path, dynamo):
    train(tmp_path, network=Residual, compute=Compute("blocks", "eager"))
    graphs, breaks = compiled_graphs()
    assert 1 <= graphs <= 3
    assert breaks == 0


@pytest.mark.parametrize(
    "compute", [pytest.param(COMPILED[0], marks=pytest.mark.thorough), COMPILED[1]], ids=IDS
)
def test_a_compiled_run_resumes_bit_for_bit_and_its_files_have_the_plain_names(
    tmp_path, dynamo, compute
):
    options = {"network": dropping, "compute": compute, "save_every": 2, "steps": 4}
    train(tmp_path / "whole", **options)
    resumed = make_trainer(tmp_path / "resumed", **options)
    crash_after(resumed, 2)
    replace(resumed, resume=True).train()
    found, expected = (read_checkpoint(tmp_path / name, 4) for name in ("resumed", "whole"))
    assert_equal_checkpoints(found, expected)
    plain = list(Residual().state_dict())
    assert sorted(expected["model.safetensors"]) == sorted(plain)
    assert sorted(expected["ema.safetensors"]) == sorted(plain)


def dropping() -> nn.Module:
    return Residual(dropout=0.1)


@pytest.mark.slow
def test_the_pipeline_of_a_compiled_run_is_one_of_diffusers(tmp_path, dynamo):
    train(tmp_path, network=unet, compute=Compute("network", "aot_eager"), steps=2)
    pipe = DiffcorePipeline.from_pretrained(tmp_path / "pipeline")
    assert list(pipe.network.state_dict()) == list(unet().state_dict())


@pytest.mark.parametrize(
    "compute",
    [*COMPILED, Compute(checkpointing=True)],
    ids=[*IDS, "checkpointing"],
)
def test_compute_changes_the_rounding_of_a_run_only_and_may_change_on_resume(
    tmp_path, dynamo, capsys, compute
):
    options = {"network": dropping, "save_every": 2, "steps": 4}
    train(tmp_path / "plain", **options)
    changed = make_trainer(tmp_path / "changed", **options)
    crash_after(changed, 2)
    replace(changed, resume=True, compute=compute).train()
    assert "compute" in capsys.readouterr().err
    found, expected = (read_checkpoint(tmp_path / name, 4) for name in ("changed", "plain"))
    for key, value in expected["model.safetensors"].items():
        torch.testing.assert_close(found["model.safetensors"][key], value, atol=1e-4, rtol=0)


def test_a_run_in_channels_last_resumes_bit_for_bit_in_that_format(tmp_path):
    options = {"network": unet, "compute": Compute(channels_last=True), "save_every": 2, "steps": 4}
    whole = train(tmp_path / "whole", **options)
    resumed = make_trainer(tmp_path / "resumed", **options)
    crash_after(resumed, 2)
    state = replace(resumed, resume=True).train()
    for run in (whole, state):
        weight = run.network.conv_in.weight
        moments = run.optimizer.optimizer.state[weight]["exp_avg"]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert moments.is_contiguous(memory_format=torch.channels_last)
    found, expected = (read_checkpoint(tmp_path / name, 4) for name in ("resumed", "whole"))
    assert_equal_checkpoints(found, expected)


def test_the_average_of_a_compiled_network_is_applied_and_taken_away(dynamo):
    network = Residual()
    Compute("network", "eager").apply(network)
    average = EMA(network, Decay(0.5))
    inputs = torch.ones(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    first = network(*inputs)
    with torch.no_grad():
        network.head.bias.add_(1)
    second = network(*inputs)
    with average.applied():
        assert torch.equal(network(*inputs), first)
    assert torch.equal(network(*inputs), second)
    assert not torch.equal(first, second)


def test_what_a_network_does_not_have_is_refused_with_the_remedy():
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no nn.ModuleList .* compute.compile: network"):
        Compute("blocks").apply(linear)
    with pytest.raises(ValueError, match=r"no nn.ModuleList .* compute.checkpointing: false"):
        Compute(checkpointing=True).apply(linear)
    with pytest.raises(ValueError, match=r"Linear has none: set compute.channels_last: false"):
        Compute(channels_last=True).apply(linear)
    with pytest.raises(ValueError, match=r"BatchNorm1d \(0\) would update .* twice: use nn.Group"):
        Compute(checkpointing=True).apply(Residual(norm=True))
    with pytest.raises(ValueError, match=r"compute.backend is 'inductr', expected one of .*induct"):
        Compute("network", "inductr").apply(linear)
    with pytest.raises(ValueError, match=r"compute.compile is 'yes', expected one of no, network"):
        Compute("yes")


class Branching(Residual):
    """A network whose graph depends on the values of its input."""

    def forward(self, x, time, class_labels=None):
        sign = 1 if x.mean().item() > 0 else -1
        return sign * super().forward(x, time, class_labels)


def test_a_network_of_several_graphs_is_refused_unless_they_are_allowed(tmp_path, dynamo):
    options = {"network": Branching, "steps": 1}
    with pytest.raises(ValueError, match=r"cannot be compiled .* set compute.fullgraph: false"):
        train(tmp_path / "one", **options, compute=Compute("network", "eager"))
    train(tmp_path / "several", **options, compute=Compute("network", "eager", fullgraph=False))
