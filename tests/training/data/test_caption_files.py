"""Captions: every kind of file, several captions, templates, shuffled and dropped tags."""

import json

import pytest

from diffcore.io.extras import import_extra
from diffcore.training.data.captions import CaptionVariants, read_captions
from tests.helpers.captioned_images import latent_dataset, prepared_dataset

TAGS = "cat, red, small, sitting, indoors"


def test_captions_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png", "text": "b"}\n'
        '{"file_name": "1.png", "text": ["c", "d", "c"]}\n'
    )
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metadata.csv").write_text("file_name,text\n2.png,e\n")
    (tmp_path / "2.txt").write_text("f\n")
    (tmp_path / "3.txt").write_text("g")
    (tmp_path / "3.json").write_text('{"caption": "h", "url": "x"}')
    (tmp_path / "4.json").write_text('["i", " j "]')
    (tmp_path / "5.json").write_text('"k"')
    (tmp_path / "0.txt").write_text("not read: metadata.jsonl has rows for this image")
    images = ["0.png", "1.png", "csv/2.png", "2.png", "3.png", "4.png", "5.png"]
    assert read_captions(tmp_path, images) == [
        ("a", "b"), ("c", "d"), ("e",), ("f",), ("g", "h"), ("i", "j"), ("k",),
    ]  # fmt: skip


def test_captions_are_read_from_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    arrow, parquet = (
        import_extra("pyarrow", "", "data"),
        import_extra("pyarrow.parquet", "", "data"),
    )
    table = arrow.table(
        {"file_name": ["0.png", "1.png", "1.png"], "text": ["a", "b", "c"], "n": [1, 2, 3]}
    )
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert read_captions(tmp_path, ["0.png", "1.png"]) == [("a",), ("b", "c")]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"metadata.parquet cannot be read"):
        read_captions(tmp_path, ["0.png"])


@pytest.mark.parametrize("content", ['{"url": "x"}', "[]", "3", '["a", 3]', "{"])
def test_a_json_file_without_a_caption_is_refused(tmp_path, content):
    (tmp_path / "0.json").write_text(content)
    with pytest.raises(ValueError, match=r"0.json (holds no caption|cannot be read)"):
        read_captions(tmp_path, ["0.png"])


def test_every_caption_of_an_image_is_drawn_equally_often_by_its_key(captioned):
    (captioned / "images/0.json").write_text(json.dumps(["one", "two"]))
    data = prepared_dataset(captioned)
    drawn = [data.texts[data.item(0, 7, position)[1]] for position in range(600)]
    counts = {text: drawn.count(text) for text in set(drawn)}
    assert set(counts) == {"a red cat", "one", "two"}
    assert min(counts.values()) > 150
    assert drawn[:50] == [data.texts[data.item(0, 7, position)[1]] for position in range(50)]
    assert data.texts[data[0][1]] == "a red cat"
    assert {data.texts[data.item(1, 7, position)[1]] for position in range(20)} == {"a blue cat"}


def test_all_variants_are_encoded_and_change_the_hash_of_the_data(captioned):
    variants = CaptionVariants(("a photo of {caption}", "{caption}"))
    data, plain = latent_dataset(captioned, variants=variants), latent_dataset(captioned)
    assert set(data.texts) == set(plain.texts) | {f"a photo of {text}" for text in plain.texts}
    assert data.content_hash != plain.content_hash


def test_shuffled_tags_are_permutations_with_the_first_in_place():
    texts = CaptionVariants(shuffle=True, keep=2, orders=20).texts((TAGS,), 3)
    assert 4 <= len(texts) <= 6  # of the six orders of three tags
    for text in texts:
        assert text.split(", ")[:2] == ["cat", "red"]
        assert sorted(text.split(", ")) == sorted(TAGS.split(", "))
    assert texts == CaptionVariants(shuffle=True, keep=2, orders=20).texts((TAGS,), 3)
    assert texts != CaptionVariants(shuffle=True, keep=2, orders=20).texts((TAGS,), 4)


def test_tags_are_dropped_at_the_rate_and_never_the_kept_ones():
    variants = CaptionVariants(tag_dropout=0.25, keep=1, orders=500)
    versions = list(variants._versions(TAGS, 0))
    assert all(text.startswith("cat") for text in versions)
    kept = sum(len(text.split(", ")) - 1 for text in versions) / (500 * 4)
    assert kept == pytest.approx(0.75, abs=0.04)
    positions = [TAGS.split(", ").index(tag) for tag in versions[7].split(", ")]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "orders is 1, expected at least 2"),
        ({"orders": 3}, "orders is 3, expected at least 2 with shuffle"),
        ({"templates": ("a photo",)}, "templates contains 'a photo'"),
        ({"templates": ()}, "templates contains ''"),
        ({"tag_dropout": 1.0, "orders": 2}, "tag_dropout, keep and separator are 1.0"),
    ],
)
def test_variants_that_cannot_be_encoded_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionVariants(**options)


def test_metadata_of_other_images_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/0.png", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"none of the 1 files .*metadata.jsonl names"):
        read_captions(tmp_path, ["0.png"])
    (tmp_path / "metadata.jsonl").unlink()
    assert read_captions(tmp_path, ["0.png"]) == []


def test_more_versions_of_a_caption_than_can_be_cached_are_refused():
    with pytest.raises(ValueError, match="orders is 1000000000, expected at most 1024"):
        CaptionVariants(shuffle=True, orders=10**9)
