"""The blocks of a network are found by its structure."""

from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from diffcore.core.network import find_blocks


class OwnForward(nn.Sequential):
    """A block that is a Sequential with a forward of its own."""

    def forward(self, x, time):
        return super().forward(x) + time


def linear() -> nn.Module:
    return nn.Linear(2, 2)


def test_the_blocks_of_a_unet_are_those_of_its_lists():
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
    )
    blocks = find_blocks(network)
    assert list(blocks)[:4] == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert {name.split(".")[0] for name in list(blocks)[4:]} == {"mid_block"}
    assert all(network.get_submodule(name) is block for name, block in blocks.items())


def test_the_blocks_of_a_dit_are_its_transformer_blocks():
    network = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, num_layers=3, sample_size=4
    )
    assert list(find_blocks(network)) == [f"transformer_blocks.{index}" for index in range(3)]


def test_lists_of_lists_are_one_list_and_layers_without_parameters_are_no_blocks():
    lists = nn.ModuleList([nn.ModuleList([linear(), nn.SiLU()]), nn.ModuleList([linear()])])
    network = nn.ModuleDict({"first": linear(), "lists": lists})
    assert list(find_blocks(nn.ModuleList([network["first"]]))) == ["0"]
    assert list(find_blocks(nn.DataParallel(network))) == ["first", "lists.0.0", "lists.1.0"]


def test_a_sequential_holds_the_blocks_only_where_no_list_does():
    sequential = nn.Sequential(linear(), nn.SiLU(), linear())
    assert list(find_blocks(sequential)) == ["0", "2"]
    parent = nn.Module()
    parent.head, parent.body = sequential, nn.ModuleList([OwnForward(linear())])
    assert list(find_blocks(parent)) == ["body.0"]
    assert find_blocks(linear()) == {}
