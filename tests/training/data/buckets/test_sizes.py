"""Buckets: their sizes, and the bucket of each image."""

import math

import pytest
import torch

from diffcore.training.data.buckets.sizes import Buckets


def assign(buckets, *sizes):
    """{(width, height) of each item: number of items}, and the assignment."""
    found = buckets.assign(*torch.tensor(sizes).T, size=0)
    return [(int(i), found.sizes[int(b)]) for i, b in zip(found.image, found.bucket, strict=True)]


def test_the_sizes_of_1024_pixels_are_those_of_stable_diffusion_xl():
    sizes = Buckets((1024,), step=64, aspect=2.0).sizes(1024)
    assert sizes == (
        (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024),
        (1088, 960), (1152, 896), (1216, 832), (1344, 768),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(256, 8, 3.0), (512, 64, 2.0), (32, 32, 1.0)]
)
def test_no_side_of_a_size_can_be_increased(resolution, step, aspect):
    sizes = Buckets((resolution,), step=step, aspect=aspect).sizes(resolution)
    assert (resolution // step * step,) * 2 in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert (
            width * height <= resolution**2 < min((width + step) * height, width * (height + step))
        )
        assert 1 / aspect <= width / height <= aspect


def test_an_image_is_read_at_the_size_that_keeps_most_of_it():
    buckets = Buckets((32,), step=8, aspect=2.0)
    sizes = [(w, h) for w in range(20, 200, 13) for h in range(20, 200, 17)]
    for index, (width, height) in assign(buckets, *sizes):
        w, h = sizes[index]
        kept = {
            size: min(w / h / (size[0] / size[1]), h / w * (size[0] / size[1]))
            for size in buckets.sizes(32)
        }
        assert kept[width, height] == pytest.approx(max(kept.values()))


def test_several_resolutions_enlarge_no_image_but_at_the_smallest():
    buckets = Buckets((64, 32), step=16)
    assert assign(buckets, (100, 100), (40, 40), (10, 10)) == [
        (0, (32, 32)), (0, (64, 64)), (1, (32, 32)), (2, (32, 32)),
    ]  # fmt: skip


def test_without_a_resolution_it_is_the_median_side_of_the_images():
    sides = torch.tensor([70, 50, 200])
    found = Buckets((), step=16).assign(sides, sides, size=32)
    assert found.sizes == ((64, 64),)


def test_the_resolution_is_the_size_of_the_data_set_unless_others_are_given():
    sides = torch.tensor([70, 50, 200])
    assert Buckets(step=16).assign(sides, sides, size=32).sizes == ((32, 32),)
    assert Buckets((48,), step=16).assign(sides, sides, size=32).sizes == ((48, 48),)
    with pytest.raises(ValueError, match="resolution of buckets is 32"):
        Buckets().assign(sides, sides, size=32)


def test_the_items_of_a_small_bucket_go_to_the_next_best():
    sizes = [(64, 64)] * 5 + [(128, 64)] * 3 + [(118, 64)]
    counts = {}
    for _, size in assign(Buckets((64,), step=8, minimum=3), *sizes):
        counts[size] = counts.get(size, 0) + 1
    assert min(counts.values()) >= 3
    assert sum(counts.values()) == len(sizes)
    assert len(counts) == 2
    assert len({size for _, size in assign(Buckets((64,), step=8, minimum=99), *sizes)}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "step and minimum are 0"),
        ({"aspect": 0.5}, "aspect is 0.5"),
        ({"aspect": math.inf}, "aspect is inf"),
        ({"resolutions": (32,)}, "at least their step of 64"),
        ({"minimum": 0}, "step and minimum"),
        ({"resolutions": (100,), "aspect": 1.0}, "no sizes have the resolution 100"),
        ({"resolutions": (10**9,), "step": 1}, "at most 4096 steps of 1 pixels"),
    ],
)
def test_buckets_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**options)
