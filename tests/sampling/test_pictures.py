"""Pictures of samples of any shape: which kind is drawn, and what each shows where."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.process import Process
from diffcore.sampling import pictures, plots

BLUE, ORANGE = plots.COLOURS[:2]


def process(*shape, low=-1.0, high=1.0):
    return Process(shape=shape, low=low, high=high)


def coloured(picture, colour):
    """Pixels (rows, columns) of nearly one colour."""
    distance = np.abs(np.asarray(picture).astype(int) - colour).max(-1)
    return np.stack(np.nonzero(distance < 40), 1)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), "points"),
        ((2, 64), "lines"),
        ((1, 8, 8), "images"),
        ((3, 8, 8), "images"),
        ((4, 8, 8), "frames"),
        ((1, 4, 8, 8), "frames"),
        ((3, 4, 8, 8), "frames"),
    ],
)
def test_the_shape_decides_the_kind(shape, kind):
    assert pictures.picture_of(process(*shape)) == kind
    picture = pictures.draw(torch.zeros(4, *shape), process(*shape), ["a", "b"], 2)
    assert np.asarray(picture).min() < 255


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((1, 2, 3, 4, 5), "auto", r"have no picture: write \.npy or \.safetensors instead"),
        ((2,), "stars", "picture is 'stars', expected one of auto, images, points"),
        ((2,), "frames", r"'frames', but samples have the shape \(2,\): expected points or lines"),
        ((1, 8), "points", "expected lines, or auto"),
        ((4, 8, 8), "images", "not images of 1 or 3 channels"),
        ((1, 8, 8), "lines", "expected images or frames, or auto"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused_with_those_that_do(shape, kind, message):
    with pytest.raises(ValueError, match=message):
        pictures.picture_of(process(*shape), kind)


def test_an_option_overrides_the_shape():
    assert pictures.picture_of(process(64), "lines") == "lines"
    assert pictures.picture_of(process(3, 8, 8), "frames") == "frames"


@pytest.mark.parametrize("low", [-1.0, -math.inf])
def test_points_lie_where_their_coordinates_are_in_the_colour_of_their_row(low):
    # Four corners of a square, and one point at three quarters of its width and a quarter below.
    x = torch.tensor([[0.0, 0], [4, 4], [0, 4], [4, 0], [3, 3], [torch.nan, 1]])
    picture = pictures.draw(x, process(2, low=low), ["", ""], 4)
    blue, orange = coloured(picture, BLUE), coloured(picture, ORANGE)
    top, left = blue.min(0)
    bottom, right = blue.max(0)
    row, column = orange.mean(0)
    assert bottom - top > 200
    assert right - left > 200
    assert abs((column - left) / (right - left) - 0.75) < 0.01
    assert abs((bottom - row) / (bottom - top) - 0.75) < 0.01
    assert np.ptp(orange, axis=0).max() < 8  # one dot: the point that is not finite is left out


@pytest.mark.parametrize(("size", "panels"), [(1, 1), (2, 1), (3, 2), (4, 2), (9, 3)])
def test_further_coordinates_have_panels_of_their_own(size, panels):
    x = torch.randn(30, size, generator=torch.Generator().manual_seed(0))
    picture = pictures.draw(x, process(size), [""], 30)
    assert picture.width == panels * plots.SIDE
    columns = coloured(picture, BLUE)[:, 1] // plots.SIDE
    assert set(columns.tolist()) == set(range(panels))


def test_one_coordinate_is_a_histogram_whose_steps_are_as_high_as_the_counts():
    x = torch.cat((torch.zeros(10, 1), torch.ones(30, 1), torch.full((1, 1), math.inf)))
    blue = coloured(pictures.draw(x, process(1), [""], 41), BLUE)
    middle = (blue[:, 1].min() + blue[:, 1].max()) / 2
    left, right = blue[blue[:, 1] < middle], blue[blue[:, 1] > middle]
    bottom = blue[:, 0].max()
    ratio = (bottom - left[:, 0].min()) / (bottom - right[:, 0].min())
    assert abs(ratio - 1 / 3) < 0.02


def test_a_signal_rises_where_its_values_do_and_has_a_gap_where_they_are_not_finite():
    x = torch.linspace(-1, 1, 101).repeat(2, 1, 1)
    x[1, 0, 40:60] = math.nan
    picture = np.asarray(pictures.draw(x, process(1, 101), [""], 2))
    whole = coloured(picture[:, : plots.LINE_WIDTH], BLUE)
    broken = coloured(picture[:, plots.LINE_WIDTH :], BLUE)
    slope = np.polyfit(whole[:, 1], whole[:, 0], 1)
    assert slope[0] < 0  # rows of pixels are counted from the top
    assert np.abs(np.polyval(slope, whole[:, 1]) - whole[:, 0]).max() < 3
    columns = np.unique(whole[:, 1])
    share = len(np.unique(broken[:, 1])) / len(columns)
    assert abs(share - 0.8) < 0.04


def test_channels_of_a_signal_have_colours_and_values_beyond_the_range_are_visible():
    x = torch.zeros(1, 2, 16)
    x[0, 1] = 3.0
    picture = pictures.draw(x, process(2, 16), ["name"], 1)
    blue, orange = coloured(picture, BLUE), coloured(picture, ORANGE)
    assert orange[:, 0].max() < blue[:, 0].min()
    assert orange[:, 0].min() > 20  # below the name and inside of the frame


def test_frames_lie_side_by_side_in_their_order():
    x = torch.linspace(-1, 1, 5).view(1, 1, 5, 1, 1).expand(2, 1, 5, 40, 40)
    sheet = np.asarray(pictures.draw(x, process(1, 5, 40, 40), ["", ""], 1))
    middles = sheet[24, [4 + 41 * frame + 20 for frame in range(5)], 0]
    assert middles.tolist() == [0, 64, 128, 191, 255]
    assert sheet.shape[:2] == (4 + 2 * 44, 4 + 5 * 40 + 4 + 4)


def test_of_many_frames_eight_are_shown_from_the_first_to_the_last():
    x = torch.linspace(-1, 1, 15).view(1, 1, 15, 1, 1).expand(1, 1, 15, 40, 40)
    sheet = np.asarray(pictures.draw(x, process(1, 15, 40, 40), [""], 1))
    middles = sheet[24, [4 + 41 * frame + 20 for frame in range(8)], 0].astype(int)
    assert middles.tolist() == [round(255 * frame / 7) for frame in range(8)]


def test_latents_without_a_range_are_scaled_from_the_least_to_the_largest_value():
    x = torch.full((1, 4, 40, 40), -3.0)
    x[0, 2] = 5
    limits = {"low": -math.inf, "high": math.inf}
    sheet = np.asarray(pictures.draw(x, process(4, 40, 40, **limits), [""], 1))
    assert sheet[24, [24, 65, 106, 147], 0].tolist() == [0, 0, 255, 0]


@pytest.mark.parametrize("low", [-1.0, -math.inf])
def test_an_animation_has_the_frames_of_the_video(tmp_path, low):
    """Without a range, all frames are scaled alike."""
    x = torch.linspace(-1, 1, 3).view(1, 1, 3, 1, 1).expand(2, 1, 3, 40, 40)
    pictures.save(x, process(1, 3, 40, 40, low=low), ["", ""], 1, tmp_path / "new/x.gif")
    with Image.open(tmp_path / "new/x.gif") as animation:
        assert animation.n_frames == 3
        assert animation.info["loop"] == 0
        for frame, value in enumerate([0, 128, 255]):
            animation.seek(frame)
            assert abs(int(np.asarray(animation.convert("L"))[24, 24]) - value) <= 2
    with pytest.raises(ValueError, match=r"\(2,\) have no frames for an animation.* \.png instead"):
        pictures.save(torch.zeros(3, 2), process(2), [""], 3, tmp_path / "y.gif")
