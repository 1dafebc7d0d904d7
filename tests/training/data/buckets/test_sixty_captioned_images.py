"""Sixty images of mixed sizes and modes with captions of every kind, in buckets.

Crop, side and caption are functions of (seed, position), in one order for one rank, for two ranks
and for a run that continues.
"""

import csv
import json
from collections import defaultdict
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch

from diffcore.core.process import Process
from diffcore.training.data import load_batches
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.captions.variants import CaptionVariants
from tests.helpers.captioned_images import prepared_dataset, write_pipeline
from tests.helpers.mixed_images import write_mixed_images

KINDS = ("jsonl", "csv", "parquet", "txt", "json")
VARIANTS = CaptionVariants(
    ("{caption}", "a photo of {caption}"), shuffle=True, keep=1, tag_dropout=0.3, orders=3
)
BUCKETS = Buckets((32,), step=8, aspect=2.5)
BATCH, STEPS, STOP = 4, 30, 11

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Sample(NamedTuple):
    """A sample of a run; its latent is that of the crop, the side and the draw of the VAE."""

    index: int
    caption: str
    latent: bytes


def captions_of(number):
    return [f"item {number}, red, round, small", f"number {number}, flat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`images` with the captions of every fifth image in each kind of file, and `pipeline`."""
    folder = tmp_path_factory.mktemp("sixty")
    write_pipeline(folder / "pipeline")
    rows = defaultdict(list)
    for number, (path, _, _) in enumerate(write_mixed_images(folder / "images")):
        kind = KINDS[number % len(KINDS)]
        first, second = captions_of(number)
        if kind == "txt":  # the second caption is in the other file beside the image
            path.with_suffix(".txt").write_text(first)
            path.with_suffix(".json").write_text(json.dumps(second))
        elif kind == "json":
            path.with_suffix(".json").write_text(json.dumps({"captions": [first, second]}))
        else:
            rows[kind] += [{"file_name": path.name, "text": text} for text in (first, second)]
    images = folder / "images"
    lines = [json.dumps(row) for row in rows["jsonl"]]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    with (images / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows["csv"])
    table = pyarrow.Table.from_pylist(rows["parquet"])
    pyarrow.parquet.write_table(table, images / "metadata.parquet")
    return folder


def dataset(folder):
    options = {"buckets": BUCKETS, "crops": 3, "flip": True, "variants": VARIANTS}
    return prepared_dataset(folder, size=32, **options)


def samples(data, rank, world, first=0, seed=3):
    """The samples of a rank by (step, index in the batch)."""
    process = Process(shape=(4, 16, 16), low=-9, high=9, classes=len(data.texts))
    order = data.order(seed, BATCH, 1, rank, world).steps(first, STEPS)
    found = {}
    for step, batch in enumerate(load_batches(data, order, process, 0), first):
        rows = zip(batch.index, batch.label, batch.batch_index, batch.x0, strict=True)
        for index, label, place, x0 in rows:
            caption, latent = data.texts[int(label)], x0.numpy().tobytes()
            found[step, int(place)] = Sample(int(index), caption, latent)
        assert len({data.groups.shape(int(index)) for index in batch.index}) == 1
    return found


def test_every_image_has_its_captions_whatever_file_they_are_in(folder):
    data = dataset(folder)
    assert len(data) == 60
    counts = []
    for index in range(60):
        number = int(data.images.names[index][:2])
        heads = {caption.split(",")[0] for caption in captions_of(number)}
        seen = {data.texts[data.item(index, 5, position)[1]] for position in range(40)}
        tags = {text.removeprefix("a photo of ") for text in seen}
        assert {tag.split(",")[0] for tag in tags} == heads
        counts.append(len(seen))
    assert min(counts) >= 4  # both captions in both templates
    assert max(counts) == 10  # and three versions of the tags of one, two of the other


def test_one_rank_two_ranks_and_a_continued_run_read_the_same(folder):
    data = dataset(folder)
    whole = samples(data, 0, 1)
    assert len(whole) == BATCH * STEPS
    assert samples(data, 0, 2) | samples(data, 1, 2) == whole
    continued = samples(dataset(folder), 0, 1, STOP)
    assert continued == {key: value for key, value in whole.items() if key[0] >= STOP}
    assert samples(data, 0, 1, seed=4) != whole


def test_latents_crops_and_captions_depend_on_seed_and_position_alone(folder):
    data, again = dataset(folder), dataset(folder)
    for index in range(0, 60, 7):
        for position in (0, 17, 4000):
            one, other = (each.item(index, 3, position) for each in (data, again))
            assert torch.equal(one[0], other[0])
            assert one[1] == other[1]
    texts = {data.item(0, 3, position)[1] for position in range(20)}
    assert len(texts) > 3
