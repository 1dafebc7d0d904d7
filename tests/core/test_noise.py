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
        itertools.product((0, 1, 2, 4094), repeat=depth) for depth in (1, 2, 3)
    ):
        branch = noise
        for index in indices:
            branch = branch.branch(index)
        channels.append(branch.channel)
    assert len(set(channels)) == len(channels)
    assert (max(channels) << 24) < 2**63
    for index, start in ((-1, noise), (4095, noise), (0, branch)):
        with pytest.raises(ValueError, match="branch"):
            start.branch(index)
