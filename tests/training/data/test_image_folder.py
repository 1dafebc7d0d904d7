"""Folders of images: labels, modes, sizes, unreadable files and flips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.training.data import DataOrder, ImageFolder, load_batches


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))


def write(
    path: Path, colour: object = 255, mode: str = "L", size: tuple[int, int] = (8, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def names(data):
    return sorted(Path(item["image"]["path"]).name for item in data.images)


def test_labels_index_the_sub_folders_sorted_by_name(tmp_path):
    for name, colour in (("b", 0), ("c", 255), ("a", 51)):
        write(tmp_path / name / "1.png", colour)
    data = ImageFolder(str(tmp_path), 8, "L")
    assert data.classes == ["a", "b", "c"]
    assert {label: round(float(x0.mean()), 3) for x0, label in data} == {0: -0.6, 1: -1.0, 2: 1.0}


def test_a_folder_without_sub_folders_has_no_classes(tmp_path):
    write(tmp_path / "1.png")
    write(tmp_path / "2.JPG")
    data = ImageFolder(str(tmp_path), 8)
    assert (len(data), data.classes) == (2, [])
    assert data[0][1] == 0


@pytest.mark.parametrize(
    "files",
    [
        ("a.png", "test-1.png", "train_2.png"),
        ("1.png", "test.png"),
        ("cat/1.png", "test/1.png", "train/1.png"),
        ("dev/1.png", "eval/1.png"),
    ],
)
def test_images_with_the_name_of_a_split_are_read(tmp_path, files):
    """The datasets library takes such names for splits."""
    for number, name in enumerate(files):
        write(tmp_path / name, 10 * number)
    assert len(ImageFolder(str(tmp_path), 8)) == len(files)


def test_an_image_that_is_added_later_is_read(tmp_path):
    write(tmp_path / "1.png")
    assert len(ImageFolder(str(tmp_path), 8)) == 1
    write(tmp_path / "2.png")
    assert len(ImageFolder(str(tmp_path), 8)) == 2


@pytest.mark.parametrize(
    ("mode", "colour", "rgb", "grey"),
    [
        ("L", 128, (128, 128, 128), 128),
        ("1", 1, (255, 255, 255), 255),
        ("LA", (128, 255), (128, 128, 128), 128),
        ("RGB", (255, 0, 51), (255, 0, 51), 82),
        ("RGBA", (255, 0, 51, 255), (255, 0, 51), 82),
        ("P", 1, (255, 0, 51), 82),
        ("I;16", 128 * 257, (128, 128, 128), 128),  # Pillow alone would clip at 255
    ],
)
def test_each_image_mode_is_converted_to_the_channels(tmp_path, mode, colour, rgb, grey):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 51])
    image.save(tmp_path / "1.png")
    for channels, expected in (("RGB", rgb), ("L", (grey,))):
        x0, _ = ImageFolder(str(tmp_path), 8, channels)[0]
        assert (x0.shape, x0.dtype) == ((len(expected), 8, 8), torch.float32)
        bytes_ = (x0.mean((1, 2)) + 1) * 127.5
        torch.testing.assert_close(
            bytes_, torch.tensor(expected, dtype=torch.float32), atol=1.01, rtol=0
        )


def striped(path):
    """Write an image of 16 x 8 pixels: black, with 8 white columns in the middle."""
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 255
    Image.fromarray(pixels).save(path)


def test_crop_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    striped(tmp_path / "1.png")
    assert ImageFolder(str(tmp_path), 8, "L")[0][0].unique().tolist() == [1.0]


def test_pad_scales_the_longer_side_and_fills_with_black(tmp_path):
    write(tmp_path / "1.png", 255, size=(16, 8))
    x0 = ImageFolder(str(tmp_path), 8, "L", "pad")[0][0][0]
    assert (x0[2:6] == 1).all()
    assert (x0[:2] == -1).all()
    assert (x0[6:] == -1).all()


def test_exact_keeps_an_image_of_its_size_and_refuses_another(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "1.png")
    data = ImageFolder(str(tmp_path), 8, "L", "exact")
    torch.testing.assert_close(
        (data[0][0][0] + 1) * 127.5, torch.tensor(pixels).float(), rtol=0, atol=1e-4
    )
    with pytest.raises(
        ValueError, match=r"\(8, 8\), expected exactly \(4, 4\): use fit crop or pad"
    ):
        ImageFolder(str(tmp_path), 4, "L", "exact")[0]


@pytest.mark.parametrize("files", [(), ("notes.txt",), ("sub/notes.txt",)])
def test_a_folder_without_images_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images: expected files ending in .*\.png"):
        ImageFolder(str(tmp_path), 8)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder: expected one with images"):
        ImageFolder(str(tmp_path / "nowhere"), 8)


@pytest.fixture
def broken(tmp_path):
    """A folder with three images, a truncated image, and a text file named like an image."""
    for name in ("1.png", "2.png", "3.png"):
        write(tmp_path / name, 7)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(
        tmp_path / "torn.png"
    )
    data = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    return tmp_path


def test_unreadable_images_are_counted_and_listed(broken):
    with pytest.raises(
        ValueError, match=r"2 unreadable of 5 images: .*(torn|text).*; .*unreadable: skip"
    ) as caught:
        ImageFolder(str(broken), 8)
    assert all(name in str(caught.value) for name in ("torn.png", "text.jpg"))


def test_unreadable_images_are_skipped_with_a_message(broken, capsys):
    data = ImageFolder(str(broken), 8, unreadable="skip")
    assert names(data) == ["1.png", "2.png", "3.png"]
    assert all(x0.isfinite().all() for x0, _ in data)
    message = "".join(capsys.readouterr())
    assert "2 unreadable of 5" in message
    assert "torn.png" in message


def test_a_folder_without_a_readable_image_is_refused_even_if_images_are_skipped(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="1 unreadable of 1"):
        ImageFolder(str(tmp_path), 8, unreadable="skip")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": "CMYK"}, "channels is 'CMYK', expected one of RGB, L"),
        ({"fit": "stretch"}, "fit is 'stretch', expected one of crop, pad, exact"),
        ({"unreadable": "ignore"}, "unreadable is 'ignore', expected one of refuse, skip"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_invalid_options_are_refused(tmp_path, fields, message):
    write(tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), **({"size": 8} | fields))


def test_mirroring_is_keyed_by_the_position_in_the_run(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "1.png")
    data = ImageFolder(str(tmp_path), 8, "L", flip=True)

    def mirrored(batch, parts, start=0):
        order = DataOrder(1, 5, batch, parts, 0, 1).steps(start, 64 // batch)
        return [bool(x0[0, 0, -1] == 1) for read in load_batches(data, order, 0) for x0 in read.x0]

    whole = mirrored(16, 1)
    assert 16 < sum(whole) < 48
    assert mirrored(8, 2) == whole
    assert mirrored(16, 1, start=2) == whole[32:]
    plain = ImageFolder(str(tmp_path), 8, "L")
    assert all(torch.equal(plain.item(0, 5, position)[0], plain[0][0]) for position in range(16))
