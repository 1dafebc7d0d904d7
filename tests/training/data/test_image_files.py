"""Which files of a folder are images, and what is refused or left out."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffcore.training.data.image_files import ImageFiles
from tests.helpers.image_folders import paths, write


def read(folder, unreadable="refuse"):
    return ImageFiles(Path(folder), 8, "L", "crop", unreadable)


@pytest.mark.parametrize(
    "names",
    [
        ("img1.png", "img[1].png"),
        ("a*b.png", "aXb.png"),
        ("photo [1].png",),
        ("set [v2]/1.png",),
        ("c[0]/1.png", "c[1]/1.png"),
        ("a::b.png",),
        ("a?b.png", "{a,b}.png", "~.png", "%41.png", "a b.png", "ü.png"),
        ("a.png", "test-1.png", "train_2.png"),
        ("1.png", "test.png"),
        ("cat/1.png", "test/1.png"),
        ("dev/1.png", "eval/1.png"),
    ],
)
def test_the_images_are_the_files_whatever_their_names(tmp_path, names):
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    images = read(tmp_path)
    assert paths(images) == sorted(names)
    expected = [names.index(name) / 127.5 - 1 for name in sorted(names)]
    assert [float(images[index].mean()) for index in range(len(images))] == pytest.approx(expected)


def test_the_order_is_that_of_the_paths(tmp_path):
    for name in ("b/1.png", "a/10.png", "a/9.png", "a-b/1.png", "B/1.png"):
        write(tmp_path / name)
    assert paths(read(tmp_path)) == ["B/1.png", "a-b/1.png", "a/10.png", "a/9.png", "b/1.png"]


def test_an_image_that_is_added_later_is_read(tmp_path):
    write(tmp_path / "1.png")
    assert len(read(tmp_path)) == 1
    write(tmp_path / "2.png")
    assert len(read(tmp_path)) == 2


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("cat/1.png", "cat/.ipynb_checkpoints/1.png", ".cache/1.png", "__MACOSX/.x.png"):
        write(tmp_path / name)
    (tmp_path / "cat/._1.png").write_bytes(b"attributes of macOS")
    assert paths(read(tmp_path)) == ["cat/1.png"]
    write(tmp_path / ".hidden/1.png")
    assert paths(read(tmp_path / ".hidden")) == ["1.png"]


def test_a_name_that_is_not_utf_8_is_read_and_escaped_in_messages(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        write(tmp_path / "1.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("the file system accepts UTF-8 only")
    assert paths(read(tmp_path)) == [name]
    (tmp_path / name).write_text("not an image")
    with pytest.raises(ValueError, match=r"'caf\\udce9.png' \(it is no image") as caught:
        read(tmp_path)
    str(caught.value).encode()


def test_pipes_devices_and_broken_links_are_named(tmp_path):
    write(tmp_path / "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = (
        r"3 unreadable of 4 images: device.png \(it is not a regular file\), gone.png \(it is a "
        r"broken link\), pipe.png \(it is not a regular file\); repair or delete them"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    assert paths(read(tmp_path, "skip")) == ["1.png"]


def test_a_link_to_a_folder_around_it_is_refused(tmp_path):
    write(tmp_path / "a/1.png")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"loop is a link to a folder that contains it: remove"):
        read(tmp_path)
    (tmp_path / "a/loop").unlink()
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("held_out", ["test", "Val", "validation"])
def test_a_folder_with_a_training_and_a_held_out_split_is_refused(tmp_path, held_out):
    write(tmp_path / "train/cat/1.png")
    write(tmp_path / held_out / "cat/2.png")
    with pytest.raises(ValueError, match=f"the sub-folders train and {held_out}, so") as caught:
        read(tmp_path)
    remedy = str(caught.value).split("set folder to ")[1]
    assert paths(read(remedy)) == ["cat/1.png"]


@pytest.mark.parametrize("files", [(), ("notes.txt",), ("sub/notes.txt",), (".png", ".a.png")])
def test_a_folder_without_images_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images: expected files ending in .*\.png"):
        read(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder: expected one with images"):
        read(tmp_path / "nowhere")


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


def test_unreadable_images_are_counted_and_listed_with_the_reason(broken):
    message = (
        r"2 unreadable of 5 images: text.jpg \(it is no image of a known format\), torn.png "
        r"\(image file is truncated.*\); .*unreadable: skip"
    )
    with pytest.raises(ValueError, match=message):
        read(broken)


def test_unreadable_images_are_skipped_with_a_message(broken, capsys):
    images = read(broken, "skip")
    assert paths(images) == ["1.png", "2.png", "3.png"]
    assert all(images[index].isfinite().all() for index in range(3))
    message = "".join(capsys.readouterr())
    assert "2 unreadable of 5" in message
    assert "torn.png" in message


def test_a_folder_without_a_readable_image_is_refused_even_if_images_are_skipped(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="1 unreadable of 1"):
        read(tmp_path, "skip")


def test_a_huge_image_is_refused_with_the_reason_of_pillow(tmp_path, monkeypatch):
    write(tmp_path / "huge.png", size=(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"huge.png \(Image size \(900 pixels\) exceeds limit"):
        read(tmp_path)


def test_an_image_that_becomes_unreadable_is_named(tmp_path):
    images = read(write(tmp_path / "1.png").parent)
    (tmp_path / "1.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"1.png cannot be read: it is no image"):
        images[0]
