"""Folders of images: labels, options, flips, and the hash of the content."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.training.data import DataOrder, ImageFolder, load_batches
from tests.helpers.image_folders import paths, write

GREY = Process(shape=(1, 8, 8))


def test_labels_index_the_sub_folders_sorted_by_name(tmp_path):
    for name, colour in (("b", 0), ("c", 255), ("a", 51)):
        write(tmp_path / name / "1.png", colour)
    data = ImageFolder(str(tmp_path), 8, "L")
    assert data.class_names == ("a", "b", "c")
    assert {label: round(float(x0.mean()), 3) for x0, label in data} == {0: -0.6, 1: -1.0, 2: 1.0}


def test_the_label_is_the_first_folder_below_the_data_folder(tmp_path):
    for name in ("a/x/1.png", "b/x/2.png", "b/3.png", "b/y/z/4.png"):
        write(tmp_path / name)
    data = ImageFolder(str(tmp_path), 8, "L")
    assert (data.class_names, data.labels.tolist()) == (("a", "b"), [0, 1, 1, 1])


def test_images_without_sub_folders_have_no_classes_and_no_labels(tmp_path):
    write(tmp_path / "1.png")
    write(tmp_path / "2.JPG")
    data = ImageFolder(str(tmp_path), 8)
    assert (len(data), data.class_names, data.labels.tolist()) == (2, (), [-1, -1])
    assert data[0][1] == -1


def test_images_beside_sub_folders_are_refused_until_they_are_moved(tmp_path):
    for name in ("cat/0.png", "dog/0.png", "x.png"):
        write(tmp_path / name)
    message = "1 of 3 images beside its sub-folders, such as x.png: move each image into the sub-"
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), 8)
    (tmp_path / "x.png").rename(tmp_path / "cat/x.png")
    assert ImageFolder(str(tmp_path), 8).labels.tolist() == [0, 0, 1]


def test_links_to_folders_and_files_have_the_labels_of_their_own_names(tmp_path):
    for name in ("blobs/0", "store/b/1.png", "store/a/2.png"):
        image = write(tmp_path / f"{name}.png")
        image.rename(tmp_path / name)
    data = tmp_path / "data"
    for name in ("ant", "bee"):
        (data / name).mkdir(parents=True)
    (data / "ant/x.png").symlink_to(tmp_path / "blobs/0")  # like a cache of the hub
    (data / "ant/y.png").symlink_to(tmp_path / "store/b/1.png")
    (data / "bee/z.png").symlink_to(tmp_path / "store/a/2.png")
    (data / "cat").symlink_to(tmp_path / "store/b")
    folder = ImageFolder(str(data), 8)
    assert folder.class_names == ("ant", "bee", "cat")
    assert paths(folder.images) == ["ant/x.png", "ant/y.png", "bee/z.png", "cat/1.png"]
    assert folder.labels.tolist() == [0, 0, 1, 2]


def test_a_class_whose_images_are_all_skipped_keeps_its_label(tmp_path):
    for name in ("a", "c"):
        write(tmp_path / name / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").write_text("not an image")
    data = ImageFolder(str(tmp_path), 8, unreadable="skip")
    assert (data.class_names, data.labels.tolist()) == (("a", "b", "c"), [0, 2])


@pytest.mark.parametrize(
    ("mode", "colour", "rgb", "grey"),
    [
        ("L", 128, (128, 128, 128), 128),
        ("1", 1, (255, 255, 255), 255),
        ("LA", (128, 255), (128, 128, 128), 128),
        ("LA", (128, 0), (128, 128, 128), 128),  # a transparent pixel keeps its stored colour
        ("RGB", (255, 0, 51), (255, 0, 51), 82),
        ("RGBA", (255, 0, 51, 255), (255, 0, 51), 82),
        ("RGBA", (255, 0, 51, 0), (255, 0, 51), 82),
        ("P", 1, (255, 0, 51), 82),
        ("P with transparency", 1, (255, 0, 51), 82),
        ("I;16", 128 * 257, (128, 128, 128), 128),  # Pillow alone would clip at 255
    ],
)
def test_each_image_mode_is_converted_to_the_channels(tmp_path, mode, colour, rgb, grey):
    image, options = Image.new(mode.split()[0], (8, 8), colour), {}
    if image.mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 51])
        options = {"transparency": 1} if "with" in mode else {}
    image.save(tmp_path / "1.png", **options)
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


def test_the_sides_of_a_rotated_photo_are_those_that_viewers_show(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 16 x 8 pixels, displayed 8 x 16
    Image.new("L", (16, 8), 255).save(tmp_path / "1.jpg", exif=exif)
    x0 = ImageFolder(str(tmp_path), 8, "L", "pad")[0][0][0]
    assert (x0[:, 2:6] > 0.9).all()
    assert (x0[:, :2] == -1).all()


def test_exact_keeps_an_image_of_its_size_and_names_one_of_another_size_at_the_start(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "1.png")
    data = ImageFolder(str(tmp_path), 8, "L", "exact")
    torch.testing.assert_close(
        (data[0][0][0] + 1) * 127.5, torch.tensor(pixels).float(), rtol=0, atol=1e-4
    )
    write(tmp_path / "wide.png", size=(9, 8))
    message = r"wide.png has 9 x 8 pixels, expected exactly 8 x 8: resize it, or use fit crop or"
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), 8, "L", "exact")
    assert len(ImageFolder(str(tmp_path), 8, "L", "crop")) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": "CMYK"}, "channels is 'CMYK', expected one of RGB, L"),
        ({"fit": "stretch"}, "fit is 'stretch', expected one of crop, pad, exact"),
        ({"unreadable": "ignore"}, "unreadable is 'ignore', expected one of refuse, skip"),
        ({"size": 0}, "size is 0"),
        ({"size": 10**6}, "size is 1000000: a batch of one such image needs 12,000 GB or more"),
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
        found = {}
        for number, read in enumerate(load_batches(data, order, GREY, 0)):
            first = (start + number // parts) * batch  # position of the first of the global batch
            for row, x0 in zip(read.batch_index.tolist(), read.x0, strict=True):
                found[first + row] = bool(x0[0, 0, -1] == 1)
        return [found[position] for position in sorted(found)]

    whole = mirrored(16, 1)
    # A stream of its own: with that of the data order, mirroring would follow the permutation.
    assert whole == [float(uniform(5, Stream.AUGMENT, position)) < 0.5 for position in range(64)]
    assert 16 < sum(whole) < 48
    assert mirrored(8, 2) == whole
    assert mirrored(16, 1, start=2) == whole[32:]
    plain = ImageFolder(str(tmp_path), 8, "L")
    assert all(torch.equal(plain.item(0, 5, position)[0], plain[0][0]) for position in range(16))


def changed_hash(folder: Path, **options) -> str:
    return ImageFolder(str(folder), **({"size": 8} | options)).content_hash


def test_the_hash_changes_with_names_contents_and_options_and_not_with_the_folder(tmp_path):
    write(tmp_path / "data/cat/1.png", 1)
    write(tmp_path / "data/dog/2.png", 2)
    hashes = [changed_hash(tmp_path / "data"), changed_hash(tmp_path / "data", flip=True)]
    hashes += [changed_hash(tmp_path / "data", **{name: value}) for name, value in OPTIONS.items()]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert changed_hash(tmp_path / "moved") == hashes[0]
    write(tmp_path / "moved/dog/2.png", 3)
    hashes.append(changed_hash(tmp_path / "moved"))
    (tmp_path / "moved/dog/2.png").rename(tmp_path / "moved/dog/3.png")
    hashes.append(changed_hash(tmp_path / "moved"))
    (tmp_path / "moved/dog").rename(tmp_path / "moved/fox")
    hashes.append(changed_hash(tmp_path / "moved"))
    write(tmp_path / "moved/ant/0.png", 4)
    hashes.append(changed_hash(tmp_path / "moved"))
    assert len(set(hashes)) == len(hashes)


OPTIONS = {"size": 4, "channels": "L", "fit": "pad"}
