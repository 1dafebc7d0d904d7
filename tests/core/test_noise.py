"""Keyed randomness: Philox as published, and every number a function of (seed, stream, position, element) alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import diffcore.core.noise
from diffcore.core.noise import (
    M32,
    Noise,
    Stream,
    derived,
    increment,
    normal,
    permutation,
    philox,
    uniform,
    words,
)
from diffcore.schedules import Cosine, Flow


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    """The kat_vectors of Random123, philox4x32 with 10 rounds."""
    counter, key, answer = (
        [int(word, 16) for word in text.split()] for text in (counter, key, answer)
    )
    found = philox(tuple(torch.tensor(k) for k in key), [torch.tensor(c) for c in counter])
    assert [int(word) for word in found] == answer


def philox_in_integers(key, counter):
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M32, (a >> 32) ^ c3 ^ k1, a & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (3, 7), (2**40 + 5, 2**35 + 1), (2**63 - 1, 12), (-1, 3)]
)
def test_words_are_philox_of_the_documented_key_and_counter(seed, position):
    key = (seed & M32, seed >> 32 & M32)
    expected = [
        philox_in_integers(key, (block, Stream.NOISE, position & M32, position >> 32))
        for block in range(3)
    ]
    assert words(seed, Stream.NOISE, position, 11).tolist() == [
        list(itertools.chain(*expected))[:11]
    ]


def test_streams_keep_their_numbers():
    """Values are part of a run: renumbering one changes every seeded result."""
    assert {stream.name: stream.value for stream in Stream} == {
        "ORDER": 0,
        "LEVEL": 1,
        "NOISE": 2,
        "DROPOUT": 3,
        "AUGMENT": 4,
        "MODEL": 5,
        "START": 6,
        "STEP": 7,
        "ORACLE": 8,
        "PATH": 9,
        "PERTURBATION": 20,
        "OFFSET": 21,
        "LATENT": 22,
    }


def test_seeds_and_positions_differ_beyond_32_bits():
    seeds = torch.tensor([1, 1 + 2**32, 1 + 2**40, 1 - 2**63])
    assert len(set(map(tuple, words(seeds, Stream.NOISE, 0, 4).tolist()))) == 4
    assert len(set(map(tuple, words(1, Stream.NOISE, seeds, 4).tolist()))) == 4


def test_every_coordinate_of_the_key_gives_other_numbers():
    seeds, positions = torch.arange(20).repeat_interleave(20), torch.arange(20).repeat(20)
    blocks = torch.cat([words(seeds, stream, positions, 4) for stream in Stream])
    assert len(blocks.unique(dim=0)) == 20 * 20 * len(Stream)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5,), (1, 3, 3), ()], ids=str)
def test_a_row_depends_on_its_own_key_whatever_its_neighbours_and_their_order(shape):
    seeds, positions = torch.tensor([5, 2**33, 7, 5, 11]), torch.tensor([0, 3, 2**34, 1, 0])
    together = normal(seeds, Stream.NOISE, positions, shape)
    assert together.shape == (5, *shape)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(normal(seeds[order], Stream.NOISE, positions[order], shape), together[order])
    for i in range(5):
        assert torch.equal(
            normal(int(seeds[i]), Stream.NOISE, int(positions[i]), shape)[0], together[i]
        )
        assert torch.equal(
            uniform(seeds, Stream.LEVEL, positions, 3)[i],
            uniform(seeds[i], Stream.LEVEL, positions[i], 3)[0],
        )


@pytest.mark.parametrize("count", range(1, 10))
def test_fewer_numbers_are_the_first_ones(count):
    assert torch.equal(
        normal(1, Stream.NOISE, 2, (count,)), normal(1, Stream.NOISE, 2, (50,))[:, :count]
    )
    assert torch.equal(
        uniform(1, Stream.NOISE, 2, count), uniform(1, Stream.NOISE, 2, 50)[:, :count]
    )


def test_normals_are_box_muller_of_the_words():
    w = words(9, Stream.START, 4, 100).numpy()[0]
    u = (w + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).ravel()
    found = normal(9, Stream.START, 4, (10, 10), dtype=torch.float64)
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=1e-12, atol=1e-14)


def test_uniforms_hold_52_bits_of_two_words():
    high, low = words(9, Stream.LEVEL, 4, 6).numpy().reshape(3, 2).T
    np.testing.assert_allclose(
        uniform(9, Stream.LEVEL, 4, 3)[0], (high + low / 2**32) / 2**32, rtol=0, atol=2**-52
    )
    bits = uniform(0, Stream.LEVEL, 0, 1000) * 2**52 - 0.5
    assert torch.equal(bits, bits.round())
    assert (
        0.4 < (bits.long() & 1).double().mean() < 0.6
    )  # the last bit is random too: 6 standard errors


def test_normals_are_normal_and_independent():
    z = normal(
        torch.arange(100), Stream.NOISE, torch.arange(100) % 7, (200,), dtype=torch.float64
    ).numpy()
    for part in (z, z[:, 0::2], z[:, 1::2], z[0:50], abs(z)):
        law = stats.halfnorm if part.min() > 0 else stats.norm
        assert stats.kstest(part.ravel(), law.cdf).pvalue > 0.01
    for a, b in (
        (z[:, :-1], z[:, 1:]),
        (z[:-1], z[1:]),
        (z[:, :-1] ** 2, z[:, 1:] ** 2),
        (z[:-1] ** 2, z[1:] ** 2),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_uniforms_are_uniform_and_independent_across_streams_and_positions():
    u = {
        stream: uniform(3, stream, torch.arange(20_000))[:, 0].numpy()
        for stream in (Stream.LEVEL, Stream.DROPOUT)
    }
    for values in u.values():
        assert stats.kstest(values, "uniform").pvalue > 0.01
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(20_000)
    assert abs(np.corrcoef(*u.values())[0, 1]) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("word", [0, M32])
def test_extreme_words_stay_inside_the_open_interval_and_finite(word, monkeypatch):
    monkeypatch.setattr(diffcore.core.noise, "words", lambda *args: torch.full((1, args[3]), word))
    u = uniform(0, Stream.LEVEL, 0, 4)
    assert ((u > 0) & (u < 1)).all()
    assert Cosine().logsnr(u).isfinite().all()
    largest = math.sqrt(-2 * math.log(0.5 / 2**32))  # 6.8, as far as 32 bits reach
    assert normal(0, Stream.NOISE, 0, (3,)).abs().max() <= largest * (1 + 1e-7)


def test_A6_the_transform_runs_in_float64_and_only_its_result_is_rounded():
    exact = normal(1, Stream.NOISE, 0, (1000,), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(normal(1, Stream.NOISE, 0, (1000,), dtype=dtype), exact.to(dtype))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), normal(1, Stream.NOISE, 0, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normal(1, Stream.NOISE, 0, (8,)), first)


def test_permutations_are_uniform_and_a_function_of_seed_and_epoch():
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(permutation(1, epoch, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert set(counts) == set(itertools.permutations(range(3)))
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert torch.equal(permutation(1, 5, 1000), permutation(1, 5, 1000))
    assert torch.equal(permutation(1, 5, 1000).sort().values, torch.arange(1000))
    assert not torch.equal(permutation(1, 5, 1000), permutation(2, 5, 1000))


def test_derived_seeds_are_32_bits_of_their_own_stream():
    seeds = [derived(3, Stream.MODEL, position) for position in range(100)]
    assert seeds == words(3, Stream.MODEL, torch.arange(100), 1)[:, 0].tolist()
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**31  # the top bit is used


def test_F6_a_samples_noise_depends_on_its_seed_and_step_alone():
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


SCHEDULE = Cosine()
KNOTS = [
    SCHEDULE.at(logsnr)
    for logsnr in (-math.inf, -14.0, -9.3, -4.0, -3.999, -0.5, 0.0, 0.25, 3.0, 7.7, 16.0)
]


def gram(intervals):
    """Covariance of the increments, from their coefficients on independent normals."""
    rows = [increment(t, s) for t, s in intervals]
    return torch.tensor(
        [[sum(a.get(m, 0.0) * c for m, c in b.items()) for a in rows] for b in rows],
        dtype=torch.float64,
    )


def test_increments_of_the_path_are_independent_standard_normals():
    """Exactly, computed from the coefficients: over neighbouring intervals, in any order, on other knots."""
    for knots in (KNOTS, KNOTS[::2], KNOTS[::3]):
        intervals = list(itertools.pairwise(knots))
        torch.testing.assert_close(
            gram(intervals), torch.eye(len(intervals)).double(), rtol=0, atol=1e-11
        )


def test_increments_that_overlap_have_the_covariance_of_one_motion():
    """Over (a, c) and (b, d), a < b < c < d: (c - b) / √((c - a)(d - b)) in clock time e^λ."""
    a, b, c, d = (math.exp(logsnr) for logsnr in (-1.0, -0.5, 0.5, 1.0))
    levels = [SCHEDULE.at(math.log(time)) for time in (a, b, c, d)]
    found = gram([(levels[0], levels[2]), (levels[1], levels[3])])[0, 1]
    assert found == pytest.approx(
        (c - b) / math.sqrt((c - a) * (d - b)), rel=1e-4
    )  # places are rounded
    assert gram([(levels[0], levels[1]), (levels[1], levels[0])])[0, 1] == pytest.approx(
        1, abs=1e-12
    )


def test_path_noise_is_standard_normal_and_each_row_a_function_of_its_seed_and_interval_alone():
    t, s = KNOTS[5:7]
    many = Noise(torch.arange(4000), (3,), dtype=torch.float64, path=True)
    z = many.between(t, s, 7)
    assert stats.kstest(z.flatten(), "norm").pvalue > 0.01
    assert torch.equal(z, many.between(t, s, 8))
    for row in (0, 17, 3999):
        alone = Noise(torch.tensor([row]), (3,), dtype=torch.float64, path=True)
        assert torch.equal(alone.between(t, s, 0)[0], z[row])
    assert torch.equal(many.start(), Noise(torch.arange(4000), (3,), dtype=torch.float64).start())


def test_blocks_do_not_change_the_path(monkeypatch):
    noise = Noise(torch.arange(5), (3,), path=True)
    together = noise.between(*KNOTS[5:7], 0)
    monkeypatch.setattr(diffcore.core.noise, "BLOCK", 1)
    assert torch.equal(noise.between(*KNOTS[5:7], 0), together)


def test_without_a_path_noise_between_levels_is_the_steps():
    noise = Noise(torch.arange(5), (3,))
    assert torch.equal(noise.between(*KNOTS[5:7], 4), noise.step(4))


@pytest.mark.parametrize("followed", (False, True))
def test_branches_are_independent_and_never_the_same(followed):
    root = Noise(torch.arange(2000), (), dtype=torch.float64, path=followed)
    branches = [
        root,
        root.branch(0),
        root.branch(1),
        root.branch(0).branch(0),
        root.branch(0).branch(1).branch(2),
    ]
    assert len({branch.channel for branch in branches}) == len(branches)
    draws = torch.stack([branch.between(*KNOTS[5:7], 3) for branch in branches])
    assert (draws.corrcoef() - torch.eye(5)).abs().max() < 5 / math.sqrt(2000)


def test_channels_of_all_branches_three_deep_differ_and_more_are_refused():
    noise = Noise(torch.arange(1), ())
    channels = [noise.channel]
    for path in itertools.chain.from_iterable(
        itertools.product((0, 1, 2, 4094), repeat=depth) for depth in (1, 2, 3)
    ):
        branch = noise
        for index in path:
            branch = branch.branch(index)
        channels.append(branch.channel)
    assert len(set(channels)) == len(channels)
    assert (max(channels) << 24) < 2**63
    for index, start in ((-1, noise), (4095, noise), (0, branch)):
        with pytest.raises(ValueError, match="branch"):
            start.branch(index)


def test_steps_of_ddpm_compose_exactly_along_the_path():
    """With x_0 fixed, noise that one step of DDIM(1) leaves is what any number of steps between leave: e^λ is its clock."""
    noise = Noise(torch.arange(3), (2,), dtype=torch.float64, path=True)
    places = [
        4 * math.log(k / (2**20 - k)) for k in (200_000, 300_000, 500_000, 510_000, 800_000)
    ]  # no rounding
    levels = [SCHEDULE.at(-math.inf), *map(SCHEDULE.at, places)]

    def left(levels):
        eps = torch.zeros(3, 2, dtype=torch.float64)
        for t, s in itertools.pairwise(levels):
            r = math.exp((t.logsnr - s.logsnr) / 2)
            eps = r * eps + math.sqrt(1 - r**2) * noise.between(t, s, 0)
        return eps

    torch.testing.assert_close(left(levels), left(levels[::5]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        left([levels[0], *levels[3:]]), left(levels[::5]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("t", "s", "message"),
    [
        (SCHEDULE.at(3.0), SCHEDULE.at(math.inf), "clean level"),
        (SCHEDULE.at(3.0), SCHEDULE.at(3.0 + 1e-9), "closer than"),
        (SCHEDULE.at(torch.zeros(2, 1)), SCHEDULE.at(torch.ones(2, 1)), "map of levels"),
    ],
)
def test_steps_that_a_path_cannot_take_are_refused(t, s, message):
    with pytest.raises(ValueError, match=message):
        Noise(torch.arange(2), (1,), path=True).between(t, s, 0)
