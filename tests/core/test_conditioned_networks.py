"""Networks with named conditions: channels beside x, and vectors beside the time."""

import copy

import diffusers
import pytest
import torch
from torch import nn

from diffcore.core.conditioned_networks import ConcatenatedChannels, EmbeddedVectors

X, TIME = (
    torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3.0, 700]),
)


def unet(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "block_out_channels": (8, 8),
                "down_block_types": ("DownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "add_attention": False,
            }
            | options
        ).eval()


class Echo(nn.Module):
    """Returns its input, or the vector that it receives."""

    def forward(self, x, time, class_labels=None, **others):
        self.others = others
        return x if class_labels is None else class_labels


def test_channels_are_concatenated_in_the_order_of_the_option():
    network = ConcatenatedChannels(Echo, {"image": 2, "mask": 1})
    image, mask = torch.full((2, 2, 8, 8), 5.0), torch.full((2, 1, 8, 8), 7.0)
    joined = network(X, TIME, mask=mask, image=image, other=1)
    assert torch.equal(joined, torch.cat([X, image, mask], 1))
    assert network.network.others == {"other": 1}


def test_a_smaller_image_is_scaled_by_the_nearest_neighbour():
    low = torch.arange(32.0).view(2, 1, 4, 4)
    joined = ConcatenatedChannels(Echo, {"low": 1})(X, TIME, low=low)
    assert torch.equal(joined[:, 1:, ::2, 1::2], low)
    assert torch.equal(joined[:, 1:, 1::2, ::2], low)


def test_a_widened_network_starts_as_the_network_without_conditions():
    network = ConcatenatedChannels(unet, {"image": 3}, widen=True)
    before = unet()(X, TIME).sample
    after = network(X, TIME, image=torch.randn(2, 3, 8, 8)).sample
    assert torch.allclose(before, after, atol=1e-6)
    assert network.config["in_channels"] == 4
    assert network.network.conv_in.weight.requires_grad


def test_a_widened_convolution_keeps_its_options():
    class Dilated(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"padding": 2, "dilation": 2, "padding_mode": "circular"}
            self.conv_in = nn.Conv2d(1, 1, 3, **options)

        def forward(self, x, timestep):
            return self.conv_in(x)

    first = Dilated()
    network = ConcatenatedChannels(lambda: copy.deepcopy(first), {"image": 3}, widen=True)
    after = network(X, TIME, image=torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(after, first(X, TIME))


def test_channels_must_fit_the_network():
    with pytest.raises(ValueError, match="set in_channels to 4, or widen: true"):
        ConcatenatedChannels(unet, {"image": 3})
    ConcatenatedChannels(lambda: unet(in_channels=4), {"image": 3})
    with pytest.raises(ValueError, match="expected 3 channels and 2 axes"):
        ConcatenatedChannels(Echo, {"image": 3})(X, TIME, image=X)
    with pytest.raises(ValueError, match="no convolution conv_in"):
        ConcatenatedChannels(Echo, {"image": 3}, widen=True)
    with pytest.raises(ValueError, match="channels is"):
        ConcatenatedChannels(Echo, {})


def test_an_embedded_vector_is_added_to_the_time_embedding():
    options = {"class_embed_type": "identity", "block_out_channels": (8, 16)}
    network = EmbeddedVectors(lambda: unet(**options), {"number": 1}).eval()
    number = torch.tensor([[0.5], [-1.0]])
    inner = network.network
    embedded = network.embeddings["number"](number)
    expected = inner(X, TIME, class_labels=embedded).sample
    assert torch.equal(network(X, TIME, number=number).sample, expected)
    assert embedded.shape == (2, 32)


def test_vectors_and_labels_are_summed():
    network = EmbeddedVectors(Echo, {"a": 1, "b": 2}, width=4, classes=3)
    a, b, labels = torch.ones(2, 1), torch.ones(2, 2), torch.tensor([3, 1])
    expected = network.embeddings["a"](a) + network.embeddings["b"](b) + network.labels(labels)
    assert torch.allclose(network(X, TIME, class_labels=labels, b=b, a=a), expected)


def test_embedded_vectors_must_fit_the_network():
    with pytest.raises(ValueError, match="class_embed_type None, expected identity"):
        EmbeddedVectors(unet, {"number": 1})
    with pytest.raises(ValueError, match="set width"):
        EmbeddedVectors(Echo, {"number": 1})
    with pytest.raises(ValueError, match="sizes is"):
        EmbeddedVectors(Echo, {"number": 0}, width=4)
    with pytest.raises(ValueError, match="class labels are passed"):
        EmbeddedVectors(Echo, {"a": 1}, width=4)(X, TIME, class_labels=TIME, a=torch.ones(2, 1))


def test_a_learned_absent_value_takes_the_place_of_absent_rows_and_is_trained():
    network = ConcatenatedChannels(Echo, {"image": 2}, learned=("image",))
    network.absent["image"].data[:] = torch.tensor([5.0, 6.0]).view(2, 1, 1)
    image, absent = torch.ones(2, 2, 8, 8), torch.tensor([True, False])
    joined = network(X, TIME, image=image, image_absent=absent)
    assert joined[0, 1:, 3, 3].tolist() == [5.0, 6.0]
    assert joined[1, 1:, 3, 3].tolist() == [1.0, 1.0]
    joined[:, 1:].sum().backward()
    assert network.absent["image"].grad.flatten().tolist() == [64.0, 64.0]


@pytest.mark.parametrize(
    "learned, arguments",
    [
        ((), {}),
        ((), {"image": X, "image_absent": TIME > 0}),
        (("image",), {"image": X}),
    ],
)
def test_conditions_that_the_process_records_in_another_way_are_refused(learned, arguments):
    network = ConcatenatedChannels(Echo, {"image": 1}, learned)
    with pytest.raises(ValueError, match="expects the condition image"):
        network(X, TIME, **arguments)


def test_a_learned_name_is_that_of_a_condition():
    with pytest.raises(ValueError, match="learned has 'mask'"):
        ConcatenatedChannels(Echo, {"image": 1}, learned=("mask",))
