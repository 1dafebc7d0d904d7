"""The networks for points, volumes and video."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffcore.core.denoiser import Denoiser, extract_tensor
from diffcore.core.network import find_blocks, network_config
from diffcore.core.process import Process
from diffcore.networks import Perceptron, TwoTimes, UNet3d
from diffcore.networks.embedding import ConditionEmbedding, sinusoids
from tests.helpers.oracles import unet

NETWORKS = {
    "Perceptron": (lambda classes: Perceptron([2], 8, 2, classes), (2,)),
    "UNet3d": (lambda classes: UNet3d(1, [4, 8], 2, classes), (1, 2, 4, 6)),
}
TIME = torch.tensor([0.0, 500.0, 999.0])


def randomised(network):
    """A copy with random weights everywhere, because the last layer starts at 0."""
    network = copy.deepcopy(network)
    for index, parameter in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_starts_at_zero_and_has_the_shape_of_x(name):
    build, shape = NETWORKS[name]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    output = build(0)(x, TIME)
    assert output.shape == x.shape
    assert not output.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_depends_on_x_level_and_class_of_its_own_sample_alone(name):
    build, shape = NETWORKS[name]
    network = randomised(build(2))
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    output = network(x, TIME, labels)
    alone = torch.cat([network(x[i, None], TIME[i, None], labels[i, None]) for i in range(3)])
    torch.testing.assert_close(output, alone)
    for other in (
        network(x + 0.1, TIME, labels),
        network(x, TIME + 10, labels),
        network(x, TIME, (labels + 1) % 3),
    ):
        assert (output - other).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_label_is_the_null_label(name):
    build, shape = NETWORKS[name]
    network = randomised(build(2))
    x = torch.ones(3, *shape)
    assert torch.equal(network(x, TIME), network(x, TIME, torch.tensor([2, 2, 2])))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_denoiser_evaluates_it_with_and_without_classes_and_finds_its_blocks(name):
    build, shape = NETWORKS[name]
    process = Process(shape=shape)
    level = process.schedule.level(0.5)
    x = torch.ones(2, *shape)
    assert Denoiser(build(0), process).output(x, level).shape == x.shape
    conditional = Denoiser(build(2), replace(process, classes=2))
    assert conditional.output(x, level, torch.tensor([0, 2])).shape == x.shape
    assert len(find_blocks(build(0))) == {"Perceptron": 2, "UNet3d": 4}[name]


def test_a_perceptron_has_a_second_half_of_channels_for_a_learned_variance():
    for shape in ((2,), (3, 2, 2)):
        process, x = Process(shape=shape, variance="learned"), torch.ones(4, *shape)
        denoiser = Denoiser(Perceptron(shape, 8, 2, learns_variance=True), process)
        prediction = denoiser(x, process.schedule.level(0.5))
        assert torch.equal(prediction.variance, torch.full_like(x, 0.5))  # the output starts at 0


def test_the_sinusoids_are_those_of_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    own = sinusoids(TIME, 8)
    theirs = embeddings.get_timestep_embedding(TIME, 8, True, 0)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)


def test_a_volume_whose_sizes_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 5\), expected .* multiples of 2: set"):
        UNet3d(1, [4, 4], 2)(torch.zeros(1, 1, 4, 4, 5), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\), expected \(B, C, D, H, W\)"):
        UNet3d(1, [4, 4], 2)(torch.zeros(1, 1, 4, 4), torch.zeros(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Perceptron([2], 8)(
                torch.zeros(1, 2), torch.zeros(1), class_labels=torch.ones(1)
            ),
            "the process has classes, and the network was built without them",
        ),
        (lambda: Perceptron([]), r"shape is \[\], expected the positive sizes"),
        (lambda: Perceptron([2, 0]), r"shape is \[2, 0\]"),
        (lambda: Perceptron(layers=0), "layers is 0, expected at least 1"),
        (lambda: Perceptron(width=7), "width is 7, expected an even number"),
        (lambda: ConditionEmbedding(4, -1), "classes is -1, expected 0"),
        (lambda: UNet3d(0), "channels is 0 and groups is 8, expected at least 1"),
        (lambda: UNet3d(widths=[]), r"widths is \[\], expected positive multiples"),
        (lambda: UNet3d(widths=[12]), r"widths is \[12\], expected .* groups = 8"),
    ],
)
def test_sizes_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_condition_scales_and_shifts_the_second_norm_of_a_block():
    torch.manual_seed(0)
    block = UNet3d(1, [4], 2).down[0]
    x, condition = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 16)
    scale, shift = block.modulation(functional.silu(condition)).view(2, 2, 4, 1, 1, 1).unbind(1)
    hidden = block.norm2(block.conv1(functional.silu(block.norm1(x))))
    expected = x + block.conv2(functional.silu(hidden + hidden * scale + shift))
    torch.testing.assert_close(block(x, condition), expected)


def two_times(build, classes=0):
    torch.manual_seed(0)
    return TwoTimes(lambda: randomised(build(classes)))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_two_times_starts_as_that_of_one_time_and_learns_from_the_second(name):
    build, shape = NETWORKS[name]
    network = two_times(build)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 100.0, 999.0])
    start = network(x, TIME, end_time=ends)
    embedding = next(m for m in network.modules() if isinstance(m, ConditionEmbedding))
    hooks, embedding._forward_hooks = embedding._forward_hooks, type(embedding._forward_hooks)()
    torch.testing.assert_close(start, network.network(x, TIME))
    embedding._forward_hooks = hooks
    nn.init.normal_(network.interval[-1].weight)
    changed = network(x, TIME, end_time=ends)
    assert not torch.allclose(changed[:2], start[:2])
    assert not torch.allclose(network(x, TIME, end_time=ends.flip(0)), changed)
    with pytest.raises(RuntimeError, match=r"call the adapter itself"):
        network.network(x, TIME)
    assert torch.equal(copy.deepcopy(network)(x, TIME, end_time=ends), changed)


def test_diffusers_networks_receive_a_second_time():
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    def dit():
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=11,
        )

    def conditional():
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )

    x, time = torch.randn(2, 1, 8, 8), torch.tensor([999.0, 500.0])
    text = {"encoder_hidden_states": torch.randn(2, 3, 8)}
    labels = torch.tensor([1, 2])
    cases = ((unet, {"class_labels": labels}), (conditional, text), (dit, {"class_labels": labels}))
    for build, arguments in cases:
        network = TwoTimes(build).eval()
        assert network.config == network_config(network.network)
        with torch.no_grad():
            start = extract_tensor(network(x, time, end_time=time, **arguments))
            same = extract_tensor(network(x, time, end_time=0 * time, **arguments))
            assert torch.equal(start, same)
            plain = build().eval()
            plain.load_state_dict(network.network.state_dict())
            torch.testing.assert_close(start, extract_tensor(plain(x, time, **arguments)))
            nn.init.normal_(network.interval[-1].weight)
            changed = extract_tensor(network(x, time, end_time=0 * time, **arguments))
        if build is not dit:  # whose modulation starts at zero
            assert not torch.allclose(changed, start)


def test_a_network_without_a_known_embedding_of_the_time_names_it():
    def build():
        return nn.ModuleDict({"time": nn.Linear(1, 8)})

    assert TwoTimes(build, ["time"]).interval[0].in_features == 8
    with pytest.raises(ValueError, match=r"has no module time_embedding or timestep_embedder"):
        TwoTimes(build)
    with pytest.raises(ValueError, match=r"embeddings has 'clock'"):
        TwoTimes(build, ["clock"])
    with pytest.raises(ValueError, match=r"scale is 0"):
        TwoTimes(build, ["time"], scale=0.0)
    with pytest.raises(ValueError, match=r"one even number"):
        TwoTimes(lambda: nn.ModuleDict({"time": nn.Linear(1, 7)}), ["time"])


class TimeOnly(nn.Module):
    """Returns its embedding of the time."""

    def __init__(self):
        super().__init__()
        self.time_embedding = nn.Linear(1, 4)

    def forward(self, x, timestep):
        return self.time_embedding(timestep[:, None])


def test_the_embedding_of_a_further_number_is_added_to_that_of_the_time():
    network = randomised(TwoTimes(TimeOnly, scale=3.0))
    x, end = torch.zeros(3, 4), torch.tensor([10.0, 20.0, 30.0])
    added = network.interval(sinusoids(3.0 * (TIME - end), 4))
    plain = network.network.time_embedding.weight[:, 0] * TIME[:, None]
    plain = plain + network.network.time_embedding.bias
    torch.testing.assert_close(network(x, TIME, end), plain + added)
