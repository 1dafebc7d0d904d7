"""A ControlNet beside a frozen UNet: its start, its training, its state and its files."""

from functools import partial

import diffusers
import pytest
import torch
from torch import nn

from diffcore.core.conditions import ConditionRecord, batch_condition, without
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.integrations.diffusers import ControlledNetwork, PromptNetwork, Prompts
from diffcore.run import Run
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import ListDataset

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CONTROL = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
TIME = torch.tensor([3.0, 700.0])
RECORD = ConditionRecord((2, 8, 8), dropout=0.5, absent="learned")
PROCESS = Process(shape=(1, 8, 8), conditions={"control": RECORD})


def unet(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "block_out_channels": (8, 8),
                "down_block_types": ("DownBlock2D", "DownBlock2D"),
                "mid_block_type": "UNetMidBlock2D",
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "cross_attention_dim": 8,
            }
            | options
        )


class Frozen(nn.Module):
    """A UNet without its ControlNet."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, time):
        return self.network(x, time, None)


def controlled(**options):
    return ControlledNetwork(unet(**options), channels=2, embedding=(4,))


def test_a_controlnet_starts_as_the_frozen_network_exactly():
    network = controlled().train()
    expected = unet().eval()(X, TIME, None).sample
    assert torch.equal(network(X, TIME, control=CONTROL), expected)
    assert not any(value.requires_grad for value in network.network.parameters())
    assert all(value.requires_grad for value in network.controlnet.parameters())
    assert not network.network.training


def test_the_first_gradient_reaches_the_zero_convolutions_and_the_second_the_condition():
    network = controlled()
    optimizer = torch.optim.SGD(network.controlnet.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        network(X, TIME, control=CONTROL).square().mean().backward()
        embedding = network.controlnet.controlnet_cond_embedding.conv_out.weight.grad
        assert bool(embedding.any()) == bool(step)
        assert network.controlnet.controlnet_mid_block.weight.grad.any()
        optimizer.step()
    assert network.network.conv_in.weight.grad is None


def test_samples_without_the_condition_are_those_of_the_frozen_network():
    network = controlled()
    for value in network.controlnet.parameters():
        torch.nn.init.normal_(value, std=0.3)
    denoiser = Denoiser(network, PROCESS)
    level = PROCESS.schedule.level(0.5)
    given = batch_condition(PROCESS, torch.zeros(2), {"control": CONTROL})
    frozen = Denoiser(Frozen(network.network), Process(shape=(1, 8, 8)))
    base = frozen.output(X, level)
    assert torch.equal(denoiser.output(X, level, without(PROCESS, given, ("control",))), base)
    assert not torch.allclose(denoiser.output(X, level, given), base, atol=1e-2)


def test_the_output_is_that_of_the_modules_of_diffusers():
    network = controlled(num_class_embeds=3)
    for value in network.controlnet.parameters():
        torch.nn.init.normal_(value, std=0.3)
    labels = torch.tensor([2, 0])
    down, mid = network.controlnet(X, TIME, None, CONTROL, class_labels=labels, return_dict=False)
    expected = network.network(
        X,
        TIME,
        None,
        class_labels=labels,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    assert torch.equal(network(X, TIME, class_labels=labels, control=CONTROL), expected)


def test_prompts_and_the_condition_reach_both_networks():
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }
    network = controlled(**blocks)
    for value in network.controlnet.parameters():
        torch.nn.init.normal_(value, std=0.3)
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    bank = PromptNetwork(network, Prompts({"encoder_hidden_states": states}, ("a cat",)))
    expected = network(X, TIME, states[[1, 0]], control=CONTROL)
    assert torch.equal(bank(X, TIME, torch.tensor([1, 0]), control=CONTROL), expected)


def test_the_state_is_that_of_the_controlnet():
    network = controlled()
    state = network.state_dict()
    assert state
    assert all(name.startswith("controlnet.") for name in state)
    other = controlled()
    other.load_state_dict({name: value + 1 for name, value in state.items()})
    assert torch.equal(other.controlnet.conv_in.bias, network.controlnet.conv_in.bias + 1)
    assert network.content_hash == other.content_hash
    other.network.conv_in.bias.data += 1
    del other.content_hash
    assert network.content_hash != other.content_hash


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ControlledNetwork(torch.nn.Linear(1, 1)), "expected a UNet2DConditionModel"),
        (lambda: controlled()(X, TIME), "condition control is missing"),
        (lambda: controlled()(X, TIME, control=X.repeat(1, 2, 2, 2)), r"\(16, 16\), expected \(8,"),
        (lambda: controlled().exported_parts("run"), "StableDiffusionControlNetPipeline"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_run_trains_the_controlnet_alone_and_writes_it_for_diffusers(tmp_path):
    items = [
        (x, -1, {"control": control}) for x, control in zip(X.clamp(-1, 1), CONTROL, strict=True)
    ]
    trainer = Trainer(
        network=controlled,
        data=ListDataset(*items),
        process=PROCESS,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        folder=tmp_path / "run",
        steps=3,
        batch_size=4,
        trackers=[],
    )
    trained = trainer.train().network
    assert trained.controlnet.controlnet_mid_block.weight.any()
    assert torch.equal(trained.network.conv_in.weight, unet().conv_in.weight)
    loaded = diffusers.ControlNetModel.from_pretrained(tmp_path / "run" / "controlnet")
    averaged = Run(tmp_path / "run").denoiser(network=controlled()).network
    for name, value in averaged.controlnet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
