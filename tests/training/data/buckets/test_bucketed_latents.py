"""Latents of images in buckets: one shape for each bucket, several crops, sizes for XL."""

import shutil
from collections import Counter

import pytest
import torch

from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.vae import Latents
from diffcore.io.images.crop import Crop
from diffcore.training.data.buckets.sizes import Buckets
from tests.helpers.captioned_images import latent_dataset, prepared_dataset
from tests.helpers.mixed_images import ramp

BUCKETS = Buckets((16,), step=4, aspect=2.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def wide(captioned):
    """The five images of 18 x 16 pixels, and two of 60 x 20 and 20 x 60."""
    for name, size in (("5", (60, 20)), ("6", (20, 60))):
        ramp(*size).save(captioned / f"images/{name}.png")
        (captioned / f"images/{name}.txt").write_text("a ramp")
    return captioned


def test_latents_have_the_shape_of_their_bucket_and_are_those_of_the_crop(wide):
    data = prepared_dataset(wide, buckets=BUCKETS, crops=3, flip=True)
    assert [data[index][0].shape[1:] for index in (0, 5, 6)] == [(8, 8), (6, 10), (10, 6)]
    vae = Latents(PipelineIndex(wide / "pipeline").read("vae"))
    for position in range(8):
        _, label, extras = data.item(5, 7, position)
        height, width, _, left, rows, columns = extras["sizes"].tolist()
        assert (height, width, rows, columns) == (20, 60, 12, 20)
        offsets = [
            Crop((60, 20), (20, 12), (j + 0.5) / 3, flip).sizes[3]
            for j in range(3)
            for flip in (False, True)
        ]
        assert left in [float(offset) for offset in offsets]
        assert data.texts[label] == "a ramp"
    crop = Crop((60, 20), (20, 12), 0.5)
    with torch.no_grad():
        mean, _ = vae.posterior(data.images.read(5, crop)[None])
    torch.testing.assert_close(data[5][0], mean[0], rtol=0, atol=1e-6)


def test_each_crop_and_side_is_read_equally_often_by_its_key(wide):
    data = prepared_dataset(wide, buckets=BUCKETS, crops=2, flip=True)
    lefts = [round(float(data.item(5, 7, position)[2]["sizes"][3]), 3) for position in range(400)]
    assert len(Counter(lefts)) == 2  # mirrored crops are at the same distances
    assert min(Counter(lefts).values()) > 150
    assert lefts[:20] == [round(float(data.item(5, 7, p)[2]["sizes"][3]), 3) for p in range(20)]
    assert len(data._visits()) == 7 * 4


def test_squares_without_crops_keep_the_entries_of_an_earlier_cache(wide):
    plain = prepared_dataset(wide)
    assert plain.groups is None
    shutil.rmtree(wide / "cache/embeddings")
    bucketed = latent_dataset(wide, buckets=Buckets((16,), step=16, aspect=1.0))
    assert not bucketed.latents.missing(bucketed._visits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": Buckets((15,), step=5)}, "multiples of 2, the pixels of a latent"),
        ({"crops": 0}, "crops is 0"),
        ({"crops": 2, "fit": "pad"}, "crops is 2, expected 1, or more with fit: crop"),
    ],
)
def test_options_that_do_not_fit_are_refused(wide, options, message):
    with pytest.raises(ValueError, match=message):
        latent_dataset(wide, **options)
