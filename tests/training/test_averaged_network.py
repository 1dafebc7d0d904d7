"""The averaged weights as a network that a loss evaluates: after each step, and resumed."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from diffcore.distillation import Consistency, KnotIntervals
from diffcore.objectives.objective import Objective
from diffcore.objectives.weighting import MSE
from diffcore.schedules import Flow, UniformBlend
from diffcore.training.averages.ema import EMA, Decay
from diffcore.training.construction import build_state
from diffcore.training.loop import advance, training_batches
from tests.helpers.training_runs import (
    PROCESS,
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Averaged(Objective):
    """Plain denoising that evaluates the averaged weights too, and forgets the result."""

    needs_average = True

    def __call__(self, denoiser, x0, condition, draw, *arguments):
        networks = arguments[-1]
        with torch.no_grad():
            networks.averaged(x0, draw.level, condition)
        return super().__call__(denoiser, x0, condition, draw, *arguments)


class Tied(LabelRecorder):
    """Two layers with one weight, and a frozen layer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.layers[4].weight
        self.layers.append(self.again)
        self.time.requires_grad_(False)


CONSISTENCY = {
    "objective": Consistency(
        intervals=KnotIntervals(UniformBlend(), 4, 4, weighting=MSE("sample")), target="average"
    ),
    "network": partial(LabelRecorder, dropout=0.2),
    "process": replace(
        PROCESS, schedule=Flow(), prediction="flow_prediction", estimate="consistency"
    ),
}


def test_the_network_has_the_averaged_weights_after_each_step(tmp_path):
    state = build_state(make_trainer(tmp_path, objective=Averaged(), network=Tied))
    copy = state.networks.averaged.network
    shared = {name for name, value in copy.named_parameters() if not value.requires_grad}
    assert shared == {"time.weight", "time.bias"}
    start = {name: value.clone() for name, value in copy.state_dict().items()}
    expected = EMA(state.network, Decay(0.9))
    batches = training_batches(state, 3)
    for step in range(1, 4):
        advance(state, batches)
        expected.update(step)
        for name, value in copy.state_dict().items():
            assert torch.equal(value, expected.shadow[name]), name
        assert copy.again.weight is copy.layers[4].weight
    assert copy.time.weight is state.network.time.weight
    assert not torch.equal(copy.state_dict()["image.weight"], start["image.weight"])
    assert not torch.equal(copy.image.weight, state.network.image.weight)
    assert not copy.training
    assert state.network.training
    assert all(value.grad is None for value in copy.parameters())


@pytest.mark.parametrize("network", (LabelRecorder, Tied))
def test_a_loss_that_only_evaluates_them_changes_no_byte_of_the_run(tmp_path, network):
    plain, averaged = (
        read_checkpoint(
            train(tmp_path / name, objective=objective, network=network).settings.folder
        )
        for name, objective in {"plain": Objective(), "averaged": Averaged()}.items()
    )
    for file, tensors in plain.items():
        assert tensors.keys() == averaged[file].keys()
        for name, value in tensors.items():
            assert torch.equal(value, averaged[file][name]), (file, name)


def test_a_resumed_run_with_an_averaged_target_writes_the_same_bytes(tmp_path):
    options = CONSISTENCY | {"save_every": 1}
    train(tmp_path / "first", steps=2, network=CONSISTENCY["network"])
    options["init"] = str(tmp_path / "first")  # loaded after the copy is made
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 3)
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    own = options | {"objective": replace(CONSISTENCY["objective"], target="own")}
    train(tmp_path / "own", **own)
    one, other = (read_checkpoint(tmp_path / name, 6) for name in ("straight", "own"))
    name = "image.weight"
    assert not torch.equal(one["model.safetensors"][name], other["model.safetensors"][name])
    averages = one["ema.safetensors"]["training_calls"], one["model.safetensors"]["training_calls"]
    assert torch.equal(*averages)  # the evaluations of the target are not counted


def test_an_average_that_is_loaded_is_that_of_the_network(tmp_path):
    state = build_state(make_trainer(tmp_path, objective=Averaged()))
    other = {name: torch.full_like(value, 7) for name, value in state.average.shadow.items()}
    state.average.load(other)
    copy = state.networks.averaged.network
    assert all(torch.equal(value, other[name]) for name, value in copy.state_dict().items())


def test_weights_in_half_precision_that_are_not_frozen_are_refused():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("mean", torch.zeros(2, dtype=torch.bfloat16))

    with pytest.raises(ValueError, match=r"mean of the network is torch.bfloat16: use float32"):
        EMA(Half(), Decay(0.9), Half())
