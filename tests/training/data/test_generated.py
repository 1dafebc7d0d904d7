"""The generated data sets: known distributions, and items that are functions of (seed, index)."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from diffcore.core.random import Stream, uniform
from diffcore.training.data import Balls, MovingBalls, Sines, TwoMoons

BUILD = {
    "TwoMoons": lambda count, seed=0: TwoMoons(count, seed=seed),
    "Sines": lambda count, seed=0: Sines(count, 16, 2, 8, seed),
    "Balls": lambda count, seed=0: Balls(count, 8, seed),
    "MovingBalls": lambda count, seed=0: MovingBalls(count, 3, 8, seed),
}


@pytest.mark.parametrize("name", BUILD)
def test_an_item_is_a_function_of_seed_and_index_alone(name):
    build = BUILD[name]
    few, many, other = build(3), build(7), build(3, seed=1)
    assert (len(few), len(many)) == (3, 7)
    for index in range(3):
        x, label = few[index]
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, many[index][0], rtol=0, atol=1e-6)
        assert label == many[index][1]
        assert not torch.allclose(x, other[index][0], atol=1e-3)
    assert build(3).content_hash == few.content_hash
    assert len({few.content_hash, many.content_hash, other.content_hash}) == 3


@pytest.mark.parametrize("name", BUILD)
def test_data_without_items_and_seeds_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match="count is 0, expected at least 1 item"):
        BUILD[name](0)
    with pytest.raises(ValueError, match=r"seed is -1, expected within \[0, 2\^63\)"):
        BUILD[name](3, seed=-1)


def test_two_moons_without_noise_are_the_half_circles_of_their_formula():
    data = TwoMoons(2000, noise=0)
    points = data.x0 * 2**0.5 + torch.tensor((0.5, 0.25))
    upper, lower = points[0::2], points[1::2]
    mirrored = torch.tensor((1.0, 0.5)) - lower
    for half in (upper, mirrored):
        torch.testing.assert_close(half.norm(dim=1), torch.ones(1000), rtol=0, atol=1e-5)
        angle = torch.atan2(half[:, 1], half[:, 0]) / torch.pi
        assert kstest(angle.numpy(), "uniform").pvalue > 0.01
    assert [data[i][1] for i in range(4)] == [0, 1, 0, 1]


def test_two_moons_agree_with_those_of_scikit_learn_in_their_moments():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, label = datasets.make_moons(20_000, noise=0.1, random_state=0)
    own = TwoMoons(20_000).x0 * 2**0.5 + torch.tensor((0.5, 0.25))
    for k in (0, 1):
        half, other = own[k::2].numpy(), theirs[label == k]
        assert np.allclose(half.mean(0), other.mean(0), atol=0.02)
        assert np.allclose(np.cov(half.T), np.cov(other.T), atol=0.02)
    assert abs(float(TwoMoons(20_000).x0.std()) - 0.5) < 0.01


def test_the_parameters_of_each_sine_are_recovered_and_uniform():
    data = Sines(400, 64, 2, 10)
    time = np.arange(64) / 64
    found = []
    for x in data.x0[:, 0].double().numpy():
        # Of the recursion x(k+1) + x(k-1) = 2 cos(2π f/64) x(k), exact for a sine.
        cosine = (x[2:] + x[:-2]) @ x[1:-1] / (2 * x[1:-1] @ x[1:-1])
        frequency = 64 * np.arccos(cosine) / (2 * np.pi)
        basis = np.stack(
            (np.sin(2 * np.pi * frequency * time), np.cos(2 * np.pi * frequency * time))
        )
        weights = np.linalg.lstsq(basis.T, x, rcond=None)[0]
        assert np.abs(weights @ basis - x).max() < 1e-4
        found.append((frequency, np.hypot(*weights), np.arctan2(*weights[::-1]) / (2 * np.pi) % 1))
    frequency, amplitude, phase = np.array(found).T
    for values in ((frequency - 2) / 8, 2 * amplitude - 1, phase):
        assert kstest(values, "uniform").pvalue > 0.01


def test_balls_have_their_centre_and_radius():
    data = Balls(50, size=16)
    inside = (data.x0[:, 0] > 0).double()
    volume = inside.sum((1, 2, 3))
    radius = (volume * 3 / (4 * torch.pi)) ** (1 / 3)
    assert 0.2 * 16 - 0.2 < radius.min() < radius.max() < 0.4 * 16 + 0.2
    middle = torch.arange(16) + 0.5
    for axis in (1, 2, 3):
        other = tuple({1, 2, 3} - {axis})
        centre = (inside.sum(other) * middle).sum(1) / volume
        assert ((centre - radius > -0.4) & (centre + radius < 16.4)).all()
    # Outside and inside of the surface.
    assert (data.x0.amax((1, 2, 3, 4)) > 0.97).all()
    assert (data.x0.amin((1, 2, 3, 4)) < -0.99).all()


def test_balls_of_a_video_move_straight_at_constant_speed():
    data = MovingBalls(50, frames=5, size=16)
    weight = (data.x0[:, 0].double() + 1) / 2
    middle = torch.arange(16) + 0.5
    total = weight.sum((2, 3))
    centre = torch.stack(((weight.sum(3) * middle).sum(2), (weight.sum(2) * middle).sum(2)), -1)
    centre = centre / total[..., None]
    bend = centre[:, 2:] - 2 * centre[:, 1:-1] + centre[:, :-2]
    assert bend.abs().max() < 0.15  # the soft rim of a ball is cut at the border
    assert (centre[:, -1] - centre[:, 0]).norm(dim=1).max() > 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TwoMoons(2, noise=-1), "noise is -1, expected"),
        (lambda: TwoMoons(2, noise=float("nan")), "noise is nan, expected"),
        (lambda: Sines(2, length=1), "length is 1, expected at least 2"),
        (
            lambda: Sines(2, length=16, high=9),
            "low and high are 2.0 and 9, expected 0 < low < high",
        ),
        (lambda: Balls(2, size=3), "size is 3, expected at least 4"),
        (lambda: MovingBalls(2, frames=1), "frames is 1, expected at least 2"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_sine_has_the_frequency_phase_and_amplitude_of_its_key():
    frequency, phase, amplitude = uniform(3, Stream.ITEM, torch.arange(5), 3).unsqueeze(2).unbind(1)
    angle = 2 * math.pi * ((2 + 8 * frequency) * torch.arange(32) / 32 + phase)
    expected = (1 + amplitude) / 2 * angle.sin()
    torch.testing.assert_close(Sines(5, 32, seed=3).x0[:, 0], expected.float())


def test_a_video_begins_at_the_first_end_of_the_path_of_its_key():
    ends = uniform(0, Stream.ITEM, torch.arange(5), 4).unflatten(1, (2, 2))
    x0 = MovingBalls(5, 3, 10).x0[:, 0]
    for frame, end in ((0, 0), (2, 1)):
        ball = (x0[:, frame] + 1).double()
        place = torch.arange(10) + 0.5
        for axis in range(2):
            centre = (ball.sum(2 - axis) * place).sum(1) / ball.sum((1, 2))
            assert (centre - (2 + 6 * ends[:, end, axis])).abs().max() < 0.3
