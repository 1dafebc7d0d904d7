"""LoRA+ (2402.12354): the learning rate of B is a multiple of that of A at every step."""

from dataclasses import replace

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from diffcore.core.network import ExportableNetwork
from diffcore.integrations.diffusers import LoRA, PretrainedNetwork
from diffcore.training.checkpoints import checkpoint
from diffcore.training.optimization.lr import LearningRate
from diffcore.training.optimization.optimizers import build_optimizer, set_learning_rate
from tests.helpers import text_networks
from tests.helpers.training_runs import (
    STEPS,
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    train,
)

RATIO = 16.0
LR = LearningRate(1e-3, warmup=3, shape="cosine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    text_networks.sd(text_networks.ddim()).save_pretrained(folder)
    return folder


def adapter(folder, **options):
    torch.manual_seed(0)
    return PretrainedNetwork(folder, LoRA(rank=2, **options))


def rates(optimizer, network):
    names = {value: name for name, value in network.named_parameters()}
    return {
        names[value]: group["lr"] for group in optimizer.param_groups for value in group["params"]
    }


@pytest.mark.parametrize("decay_only_matrices", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_b_has_the_ratio_times_the_learning_rate_at_every_step(folder, kind, decay_only_matrices):
    network = adapter(folder, kind=kind, lr_ratio=RATIO)
    optimizer = build_optimizer(torch.optim.AdamW, [network], LR, decay_only_matrices)
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    for step in range(9):
        set_learning_rate(optimizer, LR(step, 9))
        found = rates(optimizer, network)
        assert found.keys() == trained
        for name, rate in found.items():
            assert rate == LR(step, 9) * (RATIO if "lora_B" in name else 1), name
    assert sum("lora_B" in name for name in found) == sum("lora_A" in name for name in found) > 0


def test_the_groups_are_those_of_peft(folder):
    network = adapter(folder, lr_ratio=RATIO)
    expected = create_loraplus_optimizer(
        network, torch.optim.AdamW, lr=LR.peak, loraplus_lr_ratio=RATIO
    )
    optimizer = build_optimizer(torch.optim.AdamW, [network], LR, False)
    assert rates(optimizer, network) == rates(expected, network)


def test_the_first_step_of_b_is_the_ratio_times_that_without_ratio(folder):
    steps = {}
    for ratio in (1.0, RATIO):
        network = adapter(folder, lr_ratio=ratio)
        optimizer = build_optimizer(torch.optim.SGD, [network], LR, False)
        set_learning_rate(optimizer, LR(1, 9))
        x, text = torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.ones(1, 8, 8)
        output = network(x, torch.tensor([500.0]), encoder_hidden_states=text)
        output.square().mean().backward()
        optimizer.step()
        steps[ratio] = dict(network.named_parameters())
    moved = [name for name, value in steps[1.0].items() if "lora_B" in name and value.any()]
    assert moved
    for name, value in steps[1.0].items():
        expected = RATIO * value if "lora_B" in name else value
        assert torch.equal(steps[RATIO][name], expected), name


class FastImage(ExportableNetwork, LabelRecorder):
    """A network of which one layer has another learning rate."""

    content_hash, exported_names = "", ()
    learning_rate_factors = {"image.weight": RATIO}  # noqa: RUF012

    def export(self, folder, process):
        """Write nothing."""


def test_a_run_resumes_with_its_groups_bit_for_bit(tmp_path):
    options = {"network": FastImage, "lr": LR, "decay_only_matrices": True}
    state = train(tmp_path / "whole", **options)
    part = make_trainer(tmp_path / "part", **options, save_every=2, keep=1)
    crash_after(part, 2)
    replace(part, resume=True, save_every=1000).train()
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")
    groups = checkpoint.read(tmp_path / "part/checkpoints/step-00000006").state["groups"]
    found = {name: group["lr"] for group in groups for name in group["params"]}
    rate = LR(STEPS - 1, STEPS)
    assert found.pop("image.weight") == RATIO * rate
    assert set(found.values()) == {rate}
    assert len(found) == len(list(state.network.parameters())) - 1


def test_without_a_ratio_there_is_one_group(folder):
    optimizer = build_optimizer(torch.optim.AdamW, [adapter(folder)], LR, False)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "lr_ratio": 0.0},
        {"rank": 2, "lr_ratio": float("inf")},
        {"rank": 2, "lr_ratio": float("nan")},
        {"rank": 0, "lr_ratio": 2.0},
        {"rank": 2, "lr_ratio": 2.0, "kind": "lokr"},
    ],
)
def test_a_ratio_that_no_matrix_has_is_refused(options):
    with pytest.raises(ValueError, match="lr_ratio is "):
        LoRA(**options)
