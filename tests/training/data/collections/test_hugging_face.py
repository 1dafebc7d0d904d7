"""Hugging Face data sets: columns, keyed order, exact resume, streams, refusals."""

import pytest
import torch

from diffcore.io.images.pixels import as_pixels
from diffcore.training.data import HuggingFaceData, HuggingFaceStream
from tests.helpers.grey_images import encoded, flat, labels_of

datasets = pytest.importorskip("datasets")


def table(values, **columns):
    """A data set of images whose grey value is the label."""
    images = [{"bytes": encoded(value), "path": None} for value in values]
    data = {"image": images, "label": list(values)} | columns
    features = datasets.Dataset.from_dict(columns).features if columns else {}
    return datasets.Dataset.from_dict(
        data,
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), **features}
        ),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved data set, a saved DatasetDict, and parquet files."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("saved")
    data = table(range(20), text=[f"grey {value % 3}" for value in range(20)])
    data.save_to_disk(folder / "plain")
    datasets.DatasetDict({"train": data, "test": data.select(range(5))}).save_to_disk(
        folder / "dict"
    )
    (folder / "parquet").mkdir()
    for shard in range(3):
        rows = data.select(range(shard * 5, shard * 5 + 5))
        rows.to_parquet(folder / "parquet" / f"p{shard}.parquet")
    yield folder
    patch.undo()


def test_a_saved_data_set_is_read_in_a_keyed_order_that_continues_exactly(saved):
    data = HuggingFaceData(str(saved / "plain"), 2, label="label", channels="L")
    assert len(data) == 20
    assert data.class_names is None
    assert data[7][1] == 7
    assert torch.equal(data[7][0], as_pixels(encoded(7), 2, "L", "crop"))
    whole = labels_of(data, (0, 8), batch=5)
    assert all(sorted(flat(whole[first : first + 4])) == list(range(20)) for first in (0, 4))
    assert labels_of(data, (3, 8), world=5, batch=5) == whole[3:]
    assert labels_of(data, (3, 5), workers=1, batch=5) == whole[3:5]


def test_splits_parquet_files_and_objects_are_read(saved):
    sizes = [len(HuggingFaceData(str(saved / "dict"), 2, split=name)) for name in ("train", "test")]
    assert sizes == [20, 5]
    files = HuggingFaceData(str(saved / "parquet"), 2, label="label", channels="L")
    assert files.labels.tolist() == list(range(15))
    given = HuggingFaceData(table([3, 1]).select([1, 0]), 2, label="label", channels="L")
    assert given.labels.tolist() == [1, 3]
    assert labels_of(given, (0, 2), batch=2)


def test_captions_and_names_of_classes_are_labels(saved):
    data = HuggingFaceData(str(saved / "plain"), 2, caption="text")
    assert data.texts == ("grey 0", "grey 1", "grey 2")
    assert data.labels.tolist() == [value % 3 for value in range(20)]
    words = HuggingFaceData(table([1, 2, 3], word=["b", "a", "b"]), 2, label="word")
    assert words.class_names == ("a", "b")
    assert words.labels.tolist() == [1, 0, 1]
    named = table([1, 0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    assert HuggingFaceData(named, 2, label="label").class_names == ("cat", "dog")
    assert HuggingFaceData(named, 2).class_names == ()


def test_the_hash_depends_on_images_labels_and_order_and_not_on_the_folder(saved, tmp_path):
    def hash_of(data, **options):
        return HuggingFaceData(data, 2, label="label", **options).content_hash

    first = hash_of(table([1, 2, 3]))
    assert hash_of(table([1, 2, 3])) == first
    others = [
        hash_of(table([1, 3, 2])),
        hash_of(table([1, 2, 4])),
        hash_of(table([1, 2, 3]), flip=True),
        hash_of(table([1, 2, 3]).select([2, 1, 0])),
    ]
    assert len({first, *others}) == 5
    (saved / "plain").rename(saved / "moved")
    moved = hash_of(str(saved / "moved"))
    (saved / "moved").rename(saved / "plain")
    assert hash_of(str(saved / "plain")) == moved


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("none", {}, r"none cannot be read as a data set: there is no such file or folder"),
        ("plain", {"image": "picture"}, "has no column 'picture', but image, label, text"),
        ("plain", {"image": "text"}, "column 'text' is .*, expected images"),
        ("plain", {"label": "label", "caption": "text"}, "an image has one condition"),
        ("plain", {"caption": "label"}, "column 'label' is .*, expected texts"),
        (
            "dict",
            {"split": "validation"},
            "it has the splits train, test, but split is 'validation'",
        ),
        ("plain", {"size": 0}, "size is 0, expected a positive number"),
    ],
)
def test_what_is_not_a_data_set_of_images_is_refused(saved, path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        HuggingFaceData(str(saved / path), **({"size": 2} | options))
    assert "\n" not in str(error.value)


def test_missing_labels_and_images_are_refused():
    empty = table([1, 2]).map(lambda row: {"label": None if row["label"] == 1 else 5})
    with pytest.raises(ValueError, match="column 'label' lacks 1 of 2 values"):
        HuggingFaceData(empty, 2, label="label")
    images = datasets.Dataset.from_dict(
        {"image": [None, {"bytes": b"no image", "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    with pytest.raises(ValueError, match="row 0 has no image"):
        HuggingFaceData(images, 2)[0]
    with pytest.raises(ValueError, match="row 1 cannot be read: it is no image"):
        HuggingFaceData(images, 2)[1]
    with pytest.raises(ValueError, match="path is a IterableDataset, expected Dataset"):
        HuggingFaceData(images.to_iterable_dataset(), 2)


def test_a_stream_is_the_same_for_every_split_and_continues_exactly(saved):
    def stream(**options):
        given = {"window": 5, "lanes": 3, "turn": 1, "label": "label", "channels": "L"} | options
        return HuggingFaceStream(str(saved / "parquet"), 2, **given)

    whole = labels_of(stream(), (0, 9), batch=5)
    assert sorted(flat(whole[:3])) == list(range(15))
    assert labels_of(stream(), (0, 9), world=5, batch=5) == whole
    assert labels_of(stream(), (4, 9), batch=5) == whole[4:]
    assert labels_of(stream(), (4, 6), workers=1, batch=5) == whole[4:6]
    renewed = labels_of(stream(restart="renew"), (3, 6), batch=5)
    assert sorted(flat(renewed)) == list(range(15))
    assert renewed != whole[3:6]


def test_an_iterable_data_set_is_a_stream():
    data = table(range(6)).to_iterable_dataset(num_shards=2)
    stream = HuggingFaceStream(data, 2, label="label", channels="L", window=3, lanes=2, turn=1)
    assert sorted(flat(labels_of(stream, (0, 2), batch=3))) == list(range(6))
    assert stream[1][1] == 1
    with pytest.raises(ValueError, match="path is a Dataset, expected IterableDataset"):
        HuggingFaceStream(table([1]), 2)
