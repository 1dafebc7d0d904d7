"""Sampling noise depends only on the seed and the step, and branches are independent."""

import itertools
import math

import pytest
import torch

from diffcore.core.noise import Noise
from diffcore.core.random import Stream, normal
from diffcore.schedules import Cosine, Flow

T, S = Cosine().at(-0.5), Cosine().at(0.0)


def test_noise_of_a_sample_depends_only_on_its_seed_and_step():
    shape = (1, 3, 3)
    noise = Noise(torch.tensor([4, 9, 2]), shape)
    alone = Noise(torch.tensor([9]), shape)
    assert torch.equal(noise.start()[1], alone.start()[0])
    for index in (0, 1, 17):
        assert torch.equal(noise.step(index)[1], alone.step(index)[0])
        assert torch.equal(noise.step(index)[1:2], normal(9, Stream.STEP, index, shape))
    draws = [noise.start(), noise.step(0), noise.step(1)]
    assert len({value for draw in draws for value in draw.flatten().tolist()}) == 3 * 27
    assert Noise(torch.tensor([4]), shape, dtype=torch.float64).step(0).dtype == torch.float64


@pytest.mark.parametrize(
    ("level", "scale"),
    [
        (Cosine().level(1.0), 1.0),
        (Flow().level(0.25), math.hypot(0.75 * 0.4, 0.25)),
        (Cosine().level(0.0), 0.4),
    ],
)
def test_the_first_sample_has_the_standard_deviation_of_noised_data(level, scale):
    noise = Noise(torch.arange(3), (2, 2), dtype=torch.float64)
    torch.testing.assert_close(
        noise.first_sample(level, 0.4), scale * noise.start(), rtol=1e-14, atol=0
    )


def test_without_a_path_noise_between_levels_is_that_of_the_step():
    noise = Noise(torch.arange(5), (3,))
    assert torch.equal(noise.between(T, S, 4), noise.step(4))


@pytest.mark.parametrize("path", (False, True))
def test_branches_are_independent_and_have_different_channels(path):
    root = Noise(torch.arange(2000), (), dtype=torch.float64, path=path)
    branches = [
        root,
        root.branch(0),
        root.branch(1),
        root.branch(0).branch(0),
        root.branch(0).branch(1).branch(2),
    ]
    assert len({branch.channel for branch in branches}) == len(branches)
    draws = torch.stack([branch.between(T, S, 3) for branch in branches])
    assert (draws.corrcoef() - torch.eye(5)).abs().max() < 5 / math.sqrt(2000)


def test_channels_of_branches_differ_and_deeper_branches_are_refused():
    noise = Noise(torch.arange(1), ())
    channels = [noise.channel]
    for indices in itertools.chain.from_iterable(
        itertools.product((0, 1, 2, 4093), repeat=depth) for depth in (1, 2, 3, 4, 5)
    ):
        branch = noise
        for index in indices:
            branch = branch.branch(index)
        channels.append(branch.channel)
    large = [noise.branch(0).branch(1), noise.branch(4094), noise.branch(2**24 - 1)]
    large = [*large, noise.branch(1).branch(8000).branch(5), noise.branch(4095).branch(1)]
    channels += [branch.channel for branch in large[1:]]
    assert len(set(channels)) == len(channels)
    for index, start in ((-1, noise), (2**24, noise), (0, branch), (4094, large[0].branch(0))):
        with pytest.raises(ValueError, match=r"branch .*use fewer branches"):
            start.branch(index)


@pytest.mark.parametrize("path", (False, True))
def test_no_two_draws_of_branches_and_steps_share_a_key(path):
    """Steps beyond 4096 and digits beyond the third are apart from the channels beside them."""
    root = Noise(torch.arange(1), (4,), dtype=torch.float64, path=path)
    branches = [root, root.branch(0), root.branch(1), root.branch(4094)]
    deep = root.branch(1).branch(2).branch(3)
    branches += [deep, root.branch(0).branch(1).branch(2).branch(3)]  # equal in their low digits
    branches.append(root.branch(4095))
    for index in (0, 4093):
        branches.append(branches[-1].branch(index))
    draws = [branch.start() for branch in branches]
    draws += [branch.step(2**k) for branch in branches for k in (0, 11, 12, 13, 23)]
    if path:
        draws += [branch.between(T, S, 0) for branch in branches]
    assert len({draw[0, 0].item() for draw in draws}) == len(draws)


def test_the_draws_of_three_nested_branches_have_the_position_of_their_channel():
    noise = Noise(torch.arange(3), (2,)).branch(5).branch(0).branch(4093)
    position = (6 << 48) + (1 << 36) + (4094 << 24)
    assert torch.equal(noise.step(7), normal(torch.arange(3), Stream.STEP, position + 7, (2,)))
    assert torch.equal(noise.start(), normal(torch.arange(3), Stream.START, position, (2,)))
