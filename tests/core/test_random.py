"""Random numbers equal published Philox and depend only on (seed, stream, position, element)."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import diffcore.core.random
from diffcore.core.random import (
    MASK32,
    Stream,
    derive_seed,
    normal,
    permutation,
    philox,
    uniform,
    words,
)
from diffcore.schedules import Cosine


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
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
def test_philox_agrees_with_the_vectors_of_random123(counter, key, expected):
    """The kat_vectors of Random123, philox4x32 with 10 rounds."""
    counter, key, expected = (
        [int(word, 16) for word in text.split()] for text in (counter, key, expected)
    )
    result = philox(tuple(torch.tensor(k) for k in key), [torch.tensor(c) for c in counter])
    assert [int(word) for word in result] == expected


def philox_in_integers(key, counter):
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK32, (a >> 32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (3, 7), (2**40 + 5, 2**35 + 1), (2**63 - 1, 12), (-1, 3)]
)
def test_words_are_philox_of_the_documented_key_and_counter(seed, position):
    key = (seed & MASK32, seed >> 32 & MASK32)
    expected = [
        philox_in_integers(key, (block, Stream.NOISE, position & MASK32, position >> 32))
        for block in range(3)
    ]
    assert words(seed, Stream.NOISE, position, 11).tolist() == [
        list(itertools.chain(*expected))[:11]
    ]


def test_streams_keep_their_numbers():
    """The values are part of the key, so a change of one changes all seeded results."""
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
        "VALIDATION": 23,
        "BUCKET": 30,
        "CROP": 31,
        "CAPTION": 32,
        "SHARD": 33,
        "MASK": 34,
        "CONDITION": 40,
        "LEVEL_LATENT": 41,
        "ITEM": 50,
        "ITEM_NOISE": 51,
        "EVALUATION": 60,
        "TRACE": 61,
        "DEQUANTISATION": 62,
        "BOUND": 63,
        "NETWORK": 70,
        "END_LEVEL": 72,
        "PAIR": 80,
        "PAIR_SEED": 81,
        "ROLLOUT": 90,
        "ROLLOUT_STEP": 91,
        "GUIDANCE_SCALE": 92,
        "INPUT_SEED": 93,
        "INPUT_NOISE": 94,
    }


def test_seeds_and_positions_differ_beyond_32_bits():
    seeds = torch.tensor([1, 1 + 2**32, 1 + 2**40, 1 - 2**63])
    assert len(set(map(tuple, words(seeds, Stream.NOISE, 0, 4).tolist()))) == 4
    assert len(set(map(tuple, words(1, Stream.NOISE, seeds, 4).tolist()))) == 4


def test_different_keys_give_different_numbers():
    seeds, positions = torch.arange(20).repeat_interleave(20), torch.arange(20).repeat(20)
    blocks = torch.cat([words(seeds, stream, positions, 4) for stream in Stream])
    assert len(blocks.unique(dim=0)) == 20 * 20 * len(Stream)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5,), (1, 3, 3), ()], ids=str)
def test_numbers_of_a_sample_depend_only_on_its_key_and_not_on_the_batch(shape):
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
    result = normal(9, Stream.START, 4, (10, 10), dtype=torch.float64)
    np.testing.assert_allclose(result.numpy().ravel(), expected, rtol=1e-12, atol=1e-14)


def test_uniforms_hold_52_bits_of_two_words():
    high, low = words(9, Stream.LEVEL, 4, 6).numpy().reshape(3, 2).T
    np.testing.assert_allclose(
        uniform(9, Stream.LEVEL, 4, 3)[0], (high + low / 2**32) / 2**32, rtol=0, atol=2**-52
    )
    bits = uniform(0, Stream.LEVEL, 0, 1000) * 2**52 - 0.5
    assert torch.equal(bits, bits.round())
    # The last bit is random; the bounds are 6 standard errors.
    assert 0.4 < (bits.long() & 1).double().mean() < 0.6


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


@pytest.mark.parametrize("word", [0, MASK32])
def test_extreme_words_stay_inside_the_open_interval_and_finite(word, monkeypatch):
    monkeypatch.setattr(diffcore.core.random, "words", lambda *args: torch.full((1, args[3]), word))
    u = uniform(0, Stream.LEVEL, 0, 4)
    assert ((u > 0) & (u < 1)).all()
    assert Cosine().logsnr(u).isfinite().all()
    largest = math.sqrt(-2 * math.log(0.5 / 2**32))  # 6.8, the largest value from 32 bits
    assert normal(0, Stream.NOISE, 0, (3,)).abs().max() <= largest * (1 + 1e-7)


def test_the_transform_runs_in_float64_and_only_its_result_is_rounded():
    exact = normal(1, Stream.NOISE, 0, (1000,), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(normal(1, Stream.NOISE, 0, (1000,), dtype=dtype), exact.to(dtype))


def test_the_global_generator_is_neither_read_nor_changed():
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


def test_derived_seeds_are_32_bit_words_of_their_stream():
    seeds = [derive_seed(3, Stream.MODEL, position) for position in range(100)]
    assert seeds == words(3, Stream.MODEL, torch.arange(100), 1)[:, 0].tolist()
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**31  # the top bit is used
