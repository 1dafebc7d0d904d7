"""Conversion of samples to images and grids of images, and back."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.process import Process
from diffcore.sampling import images


def process(channels=1, size=8, low=-1.0, high=1.0):
    return Process(shape=(channels, size, size), low=low, high=high)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-2.0, 6.0)])
def test_the_range_of_the_process_becomes_0_to_255_with_clipping(low, high):
    unit = torch.tensor([-9.0, 0.0, 0.25, 0.5, 1.0, 9.0])
    x = (low + (high - low) * unit).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    pixels = images.to_pixels(x, process(low=low, high=high))
    assert (pixels.shape, pixels.dtype) == ((6, 8, 8, 1), np.uint8)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 64, 128, 255, 255]


def test_conversion_to_x0_and_back_preserves_each_byte():
    data = torch.arange(256).view(4, 1, 8, 8)
    pixels = images.to_pixels(data / 127.5 - 1, process())
    assert pixels.transpose(0, 3, 1, 2).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (4, 8, 8), (1, 2, 3, 4)])
def test_shapes_that_are_not_images_are_rejected_with_a_remedy(shape):
    with pytest.raises(
        ValueError, match=r"not images of 1 or 3 channels: write \.safetensors instead"
    ):
        images.check_image(Process(shape=shape))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("names", [["", "", ""], ["0", "1", "22"]])
def test_a_grid_has_each_sample_at_its_position(channels, names):
    values = torch.linspace(-1, 1, 5)  # rows of 2, 2 and 1 samples
    x = values.view(5, 1, 1, 1).expand(5, channels, 8, 8)
    sheet = np.array(images.draw_grid(x, process(channels), names, 2))
    tile, margin = 40, images.MARGIN
    left = sheet.shape[1] - 2 * (tile + margin)
    assert (left > margin) == any(names)
    for index, value in enumerate(values):
        row, column = divmod(index, 2)
        top, start = margin + row * (tile + margin), left + column * (tile + margin)
        cell = sheet[top : top + tile, start : start + tile]
        assert (cell == round((float(value) + 1) * 127.5)).all(), index
        assert (sheet[top - margin : top, start:] == 255).all()
    assert (
        sheet[margin + 2 * (tile + margin) :, left + tile + margin :] == 255
    ).all()  # the sixth cell is empty
    for row, name in enumerate(names):  # the name is written to the left of the row
        beside = sheet[margin + row * (tile + margin) :][:tile, :left]
        assert (beside < 128).any() == bool(name)


def test_small_samples_are_enlarged_and_large_ones_are_not():
    sizes = [
        images.draw_grid(torch.zeros(1, 1, size, size), process(size=size), [""], 1).size[0]
        for size in (8, 20, 40, 64)
    ]
    assert sizes == [48, 48, 48, 72]


def test_a_failed_save_leaves_no_file(tmp_path, monkeypatch):
    image = images.to_image(images.to_pixels(torch.zeros(1, 3, 8, 8), process(3))[0])
    images.save_image(image, tmp_path / "new/a.png")
    with Image.open(tmp_path / "new/a.png") as back:
        assert np.array_equal(np.array(back), np.array(image))
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        images.save_image(image, tmp_path / "new/b.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_image_loads_as_its_x0(channels, tmp_path):
    record = Process(shape=(channels, 4, 6), low=-2.0, high=6.0)
    data = torch.arange(24 * channels).view(channels, 4, 6) * 3
    x = record.low + data / 255 * 8
    images.save_image(images.to_image(images.to_pixels(x[None], record)[0]), tmp_path / "x.png")
    loaded = images.load_image(tmp_path / "x.png", record)
    assert loaded.shape == record.shape
    torch.testing.assert_close(loaded, x, rtol=0, atol=1e-5)


def test_a_photo_is_loaded_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top row is displayed as the right column
    stored = np.zeros((8, 6), np.uint8)
    stored[0] = 255
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    x = images.load_image(tmp_path / "x.png", Process(shape=(1, 6, 8)))
    assert torch.equal(x[0], 2 * torch.eye(8)[7].expand(6, 8) - 1)


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("L", (8, 9), "is 8 x 9 of mode L, expected 8 x 8 of mode L: resize"),
        ("RGB", (8, 8), "is 8 x 8 of mode RGB, expected 8 x 8 of mode L"),
        ("P", (8, 8), "of mode P"),
        ("LA", (8, 8), "of mode LA"),
    ],
)
def test_an_image_of_another_size_or_mode_is_rejected(mode, size, message, tmp_path):
    Image.new(mode, size).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=message):
        images.load_image(tmp_path / "x.png", process())


def test_an_image_that_declares_ten_billion_pixels_is_rejected_and_takes_no_memory(tmp_path):
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    )
    with pytest.raises(ValueError, match=r"x.png is not a readable image: .*decompression bomb"):
        images.load_image(tmp_path / "x.png", process())


def test_a_file_that_is_not_an_image_is_rejected(tmp_path):
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"x.png is not a readable image"):
        images.load_image(tmp_path / "x.png", process())
    with pytest.raises(ValueError, match="is not a readable image"):
        images.load_image(tmp_path / "none.png", process())


def test_a_table_of_pictures_has_its_names_beside_rows_and_above_columns():
    tiles = [[Image.new("RGB", (40, 30), colour) for colour in ("red", "lime")], [None, None]]
    tiles[1][1] = Image.new("RGB", (40, 30), "blue")
    sheet = np.asarray(images.draw_table(tiles, ["DDIM()", "a longer name"], ["5", "10"], "steps"))
    left, top = sheet.shape[1] - 2 * 44, 28
    assert sheet.shape[0] == top + 2 * 34
    for row, column, colour in ((0, 0, (255, 0, 0)), (0, 1, (0, 255, 0)), (1, 1, (0, 0, 255))):
        cell = sheet[top + 34 * row :, left + 44 * column :][:30, :40]
        assert (cell == colour).all(), (row, column)
    assert (sheet[top + 34 :, left:][:30, :40] == 255).all()  # an empty cell
    for area in (sheet[:top, :left], sheet[:top, left : left + 40], sheet[:top, left + 44 :]):
        assert (area < 200).any()  # text
    assert (sheet[top : top + 30, :left] < 200).any()
    assert (sheet[top + 34 :, :left] < 200).any()
    wide = images.draw_table(tiles, ["a", "b"], ["a name wider than its tiles", "10"])
    assert wide.width > 2 * 200
