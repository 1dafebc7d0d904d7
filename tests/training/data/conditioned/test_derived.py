"""Conditions that are computed from x_0: low resolution, and random masks."""

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from diffcore.core.process import Process
from diffcore.training.data import (
    Balls,
    Digits,
    ImageFolder,
    LowResolution,
    MaskedImages,
    Mixture,
    load_batches,
)
from diffcore.training.data.source import DataSource
from tests.helpers.mixed_images import ramp

X = torch.linspace(-1, 1, 3 * 2 * 8 * 12).view(3, 2, 8, 12)
PROCESS = Process(shape=(2, 8, 12))


def images():
    return TensorDataset(X, torch.arange(3))


def test_the_low_resolution_is_the_mean_over_the_area_of_each_pixel():
    x0, label, extras = LowResolution(images(), 4, "small")[1]
    assert torch.equal(x0, X[1])
    assert label == 1
    expected = X[1].double().view(2, 2, 4, 3, 4).mean((2, 4))
    torch.testing.assert_close(extras["small"].double(), expected, rtol=0, atol=1e-6)


def test_the_low_resolution_is_that_of_the_mirrored_image(tmp_path):
    ramp(8, 8).save(tmp_path / "0.png")
    data = LowResolution(ImageFolder(str(tmp_path), 8, flip=True), 4)
    items = [data.item(0, 3, position) for position in range(8)]
    means = [item[0].view(3, 2, 4, 2, 4).mean((2, 4)) for item in items]
    torch.testing.assert_close([item[2]["low"] for item in items], means)
    assert len({float(mean[0, 0, 0]) for mean in means}) == 2  # mirrored or not


def test_the_classes_and_the_labels_are_those_of_the_data():
    digits = Digits()
    data = LowResolution(Subset(digits, [7, 3]), 2)
    assert data.class_names == digits.class_names
    assert list(data.labels) == [digits[7][1], digits[3][1]]
    assert torch.equal(data[0][2]["low"], LowResolution(digits, 2)[7][2]["low"])


def box(mask):
    """First row, last row, first column and last column of a box, which is all of the mask."""
    rows, columns = mask[0].amax(1).nonzero().flatten(), mask[0].amax(0).nonzero().flatten()
    first, last, left, right = rows[0], rows[-1], columns[0], columns[-1]
    assert mask[0, first : last + 1, left : right + 1].all()
    assert mask.sum() == (last - first + 1) * (right - left + 1)
    return int(first), int(last), int(left), int(right)


def test_a_mask_is_a_box_of_any_place_whose_sides_are_in_range():
    data = MaskedImages(images(), low=0.25, high=0.5)
    boxes = []
    for position in range(300):
        x0, _, extras = data.item(0, 3, position)
        assert torch.equal(extras["masked"], torch.where(extras["mask"] > 0, 0.0, x0))
        boxes.append(box(extras["mask"]))
    first, last, left, right = torch.tensor(boxes).unbind(1)
    assert (last - first + 1).unique().tolist() == [2, 3, 4]  # of 8
    assert (right - left + 1).unique().tolist() == [3, 4, 5, 6]  # of 12
    assert (first.min(), last.max(), left.min(), right.max()) == (0, 7, 0, 11)


def test_a_mask_is_a_function_of_seed_and_position_alone():
    data = MaskedImages(images(), boxes=2)
    masks = [data.item(0, seed, position)[2]["mask"] for seed in (0, 1) for position in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 35
    for index in (0, 2):
        assert torch.equal(data.item(index, 1, 6)[2]["mask"], masks[26])
    assert torch.equal(data[1][2]["mask"], masks[1])  # held-out data: seed 0 at the index


def test_several_boxes_are_united_and_all_of_an_image_may_be_masked():
    whole = MaskedImages(images(), 1, 1)[0][2]
    assert whole["mask"].all()
    assert not whole["masked"].any()
    assert not MaskedImages(images(), 0, 0)[0][2]["mask"].any()
    one, many = (MaskedImages(images(), 0.1, 0.2, boxes)[0][2]["mask"] for boxes in (1, 9))
    assert many.max() == 1
    assert many.sum() > one.sum()


def test_conditions_are_the_same_on_every_number_of_ranks_and_workers():
    def read(world, workers=0):
        found = {}
        for rank in range(world):
            data = MaskedImages(LowResolution(images(), 4))
            order = data.order(3, 4, 1, rank, world).steps(0, 3)
            for step, batch in enumerate(load_batches(data, order, PROCESS, workers)):
                for row, own in enumerate(batch.batch_index.tolist()):
                    found[step, own] = [batch.extras[name][row] for name in ("low", "mask")]
        return found

    one = read(1)
    assert len(one) == 12
    for other in (read(2), read(1, 1)):
        assert other.keys() == one.keys()
        for place, values in one.items():
            assert all(map(torch.equal, values, other[place]))


def test_the_hash_has_the_options_and_the_data():
    data, other = Balls(2, size=4), Balls(3, size=4)
    hashes = [
        LowResolution(data, 2).content_hash,
        LowResolution(data, 4).content_hash,
        LowResolution(data, 2, "small").content_hash,
        LowResolution(other, 2).content_hash,
        MaskedImages(data).content_hash,
        MaskedImages(data, 0.3).content_hash,
        data.content_hash,
    ]
    assert len({*hashes}) == len(hashes)
    assert MaskedImages(images()).content_hash == ""


class Latents(DataSource):
    is_latent = True

    def __len__(self):
        return 1


def test_data_and_options_that_do_not_fit_are_refused(tmp_path):
    for make, message in (
        (lambda: LowResolution(images(), 1), "factor is 1, expected"),
        (lambda: LowResolution(images(), 5)[0], r"multiples of the factor 5"),
        (lambda: LowResolution(TensorDataset(X[0]), 2)[0], r"expected \(C, H, W\)"),
        (lambda: MaskedImages(images(), 0.5, 0.2), "expected 0 <= low <= high <= 1"),
        (lambda: MaskedImages(images(), boxes=0), "boxes is 0"),
        (lambda: MaskedImages(images(), mask="masked"), "expected two names"),
        (lambda: MaskedImages(TensorDataset(X[0]))[0], r"expected \(C, H, W\)"),
        (lambda: MaskedImages(Latents()), "the data are latents"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert "low" in LowResolution(Mixture([images(), images()]), 2)[0][2]
