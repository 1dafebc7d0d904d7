"""Images in buckets: never stretched, cropped by (seed, position), in one order for all ranks."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffcore.core.process import Process
from diffcore.io.images.crop import Crop
from diffcore.io.images.pixels import crop_pixels
from diffcore.training.data import DataOrder, ImageFolder, load_batches
from diffcore.training.data.buckets.sizes import Buckets
from tests.helpers.image_folders import write
from tests.helpers.mixed_images import STEP, ramp, write_mixed_images

BUCKETS = Buckets((32,), step=4, aspect=2.5)
PROCESS = Process(shape=(3, 32, 32))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return folder, write_mixed_images(folder)


def folder_of(mixed, **options):
    return ImageFolder(str(mixed[0]), 32, **({"buckets": BUCKETS, "crop": "random"} | options))


def slope(x0, axis):
    """Mean change of the first (axis -1) or second (axis -2) channel per pixel, in grey values."""
    channel = x0[0 if axis == -1 else 1]
    inner = channel[4:-4, 4:-4]  # the ends of the filter
    return float(inner.diff(dim=axis).mean() * 127.5)


def test_no_image_is_stretched_and_the_crop_is_where_its_sizes_say(mixed):
    """Red is 2 x and green 2 y in the source: both slopes in the crop are 2 / s."""
    data, checked = folder_of(mixed), 0
    for index in range(len(data)):
        _, kind, source = mixed[1][int(data.items.image[index])]
        x0, _ = data.item(index, 3, 1000 + index)
        assert data.items.crop(index).source == source  # upright
        assert x0.shape == data.groups.shape(index)
        if kind not in ("RGB", "EXIF", "RGBA"):
            continue
        expected = STEP / data.items.crop(index).scale
        assert slope(x0, -1) == pytest.approx(expected, rel=0.02)
        assert slope(x0, -2) == pytest.approx(expected, rel=0.02)
        checked += 1
    assert checked == 18


@pytest.mark.parametrize(
    ("source", "target"), [((90, 48), (32, 32)), ((48, 90), (24, 40)), ((50, 50), (40, 24))]
)
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_the_sizes_locate_the_crop_in_the_scaled_image(source, target, is_mirrored, tmp_path):
    """The colour of a pixel of the crop is that of its coordinates in the source."""
    image = ramp(*source)
    image.save(tmp_path / "0.png")
    crop = Crop(source, target, 0.8, is_mirrored)
    x0 = crop_pixels((tmp_path / "0.png").read_bytes(), "RGB", crop)
    height, width, top, left, rows, columns = crop.sizes.tolist()
    assert (width, height) == source
    assert (columns, rows) == target == (x0.shape[2], x0.shape[1])
    y, x = 10, 12
    red, green = ((x0[:2, y, x] + 1) * 127.5 / STEP).tolist()
    x_source = (left + x + 0.5) / crop.scale - 0.5
    assert green == pytest.approx((top + y + 0.5) / crop.scale - 0.5, abs=0.5)
    assert red == pytest.approx(width - 1 - x_source if is_mirrored else x_source, abs=0.5)


def test_a_central_crop_is_that_of_pillow(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8))
    image.save(tmp_path / "0.png")
    for target in ((32, 32), (24, 40), (40, 24)):
        x0 = crop_pixels((tmp_path / "0.png").read_bytes(), "RGB", Crop((71, 50), target))
        pillow = ImageOps.fit(image, target, Image.Resampling.LANCZOS)
        expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(x0, expected, rtol=0, atol=1.01 / 127.5)
        assert ((x0 - expected).abs() > 1e-6).float().mean() < 0.01


def test_the_crop_is_a_function_of_seed_and_position(mixed):
    data = folder_of(mixed, flip=True)
    first = data.item(3, 7, 100)[0]
    assert torch.equal(first, folder_of(mixed, flip=True).item(3, 7, 100)[0])
    assert not torch.equal(first, data.item(3, 7, 101)[0])
    assert not torch.equal(first, data.item(3, 8, 100)[0])
    wide = Crop((100, 40), (32, 32))
    assert wide.box[0] == pytest.approx(30)  # the centre without a key


def test_every_mode_is_read_as_the_same_colours(mixed):
    """16 bits, CMYK, palettes, alpha and EXIF orientation: the colours of the plain RGB image."""
    data = folder_of(mixed, crop="center")
    for index in range(20):
        path, kind, source = mixed[1][int(data.items.image[index])]
        crop = data.items.crop(index)
        expected = crop.apply(ramp(*source), Image.Resampling.LANCZOS)
        values = (data[index][0] + 1) * 127.5
        plain = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
        if kind in ("RGB", "EXIF", "RGBA", "CMYK"):
            assert (values - plain).abs().max() <= 1.5, path
        elif kind in ("P", "GIF"):
            assert (values - plain).abs().mean() < 12, path
        elif kind == "I;16":
            assert (values - plain[:1]).abs().max() <= 1.5, path
        else:
            assert torch.equal(values[0], values[1]), path


def test_every_batch_of_a_run_is_of_one_bucket_for_every_number_of_ranks(mixed):
    data = folder_of(mixed)

    def batches(world, accumulation, start=0):
        found = {}
        for rank in range(world):
            order = data.order(5, 4, accumulation, rank, world).steps(start, 20)
            loaded = load_batches(data, order, PROCESS, 0)
            for number, batch in enumerate(loaded):
                step = start + number // accumulation
                for row, x0 in zip(batch.batch_index.tolist(), batch.x0, strict=True):
                    found[step, row] = x0
        return found

    whole = batches(1, 1)
    assert {len({whole[step, row].shape for row in range(4)}) for step in range(20)} == {1}
    assert len({x0.shape for x0 in whole.values()}) == len(data.groups.shapes) == 4
    for other in (batches(2, 1), batches(2, 2)):
        assert all(torch.equal(other[key], x0) for key, x0 in whole.items())
    resumed = batches(2, 1, 13)
    assert all(torch.equal(x0, whole[key]) for key, x0 in resumed.items())


def test_the_hash_of_the_data_covers_buckets_and_crops(mixed):
    hashes = {
        folder_of(mixed, **options).content_hash
        for options in ({}, {"crop": "center"}, {"buckets": None}, {"buckets": Buckets((40,), 8)})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "pad", "crop": "center"}, "fit is pad, but images are cropped"),
        ({"crop": "middle"}, "crop is 'middle'"),
        ({"fit": "pad", "buckets": None}, "crop is 'random'"),
    ],
)
def test_options_that_contradict_buckets_are_refused(mixed, options, message):
    with pytest.raises(ValueError, match=message):
        folder_of(mixed, **options)


def test_an_image_that_changed_its_size_after_the_scan_is_refused(tmp_path):
    data = ImageFolder(str(write(tmp_path / "d/0.png", mode="RGB", colour=0).parent), 8)
    write(tmp_path / "d/0.png", mode="RGB", colour=0, size=(9, 8))
    with pytest.raises(
        ValueError, match=r"0.png cannot be read: it has 9 x 8 pixels, expected 8 x 8"
    ):
        data[0]


def test_one_bucket_order_is_that_of_the_data_source(mixed):
    order = folder_of(mixed).order(5, 4, 1, 0, 1)
    assert isinstance(order, DataOrder)
    assert order.groups is not None
