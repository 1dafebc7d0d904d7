"""Image files are read as viewers show them, for every format, orientation and depth."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffcore.io.images.reader import FORMATS, read_image

DISPLAYED = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}
"""EXIF orientation -> what a viewer shows of the stored pixels (CIPA DC-008, tag 0x0112)."""

CORNER = np.zeros((16, 24), np.uint8)
CORNER[:8, :8], CORNER[:8, 8:16] = 255, 128


def encode(image, form, **options):
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", DISPLAYED)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright_by_its_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(form, {})
    image = read_image(encode(Image.fromarray(CORNER), form, exif=exif, **options))
    expected = DISPLAYED[orientation](CORNER).astype(int)
    np.testing.assert_allclose(np.asarray(image.convert("L")), expected, rtol=0, atol=2)


def test_an_image_of_16_bits_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(CORNER.astype(np.uint16) * 257)
    read = read_image(encode(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(read), np.rot90(CORNER, -1))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8_bits(form):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    image = read_image(encode(Image.fromarray(values), form))
    assert np.asarray(image).tolist() == [[0, 0, 1, 1, 128, 255]]


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        (np.array([[0, 224]], np.int32), "from 0 to 224"),
        (np.array([[0, 900_000]], np.int32), "from 0 to 900000"),
        (np.array([[-1000, 1240]], np.int32), "from -1000 to 1240"),
        (np.array([[0.0, 1.0]], np.float32), "from 0.0 to 1.0"),
        (np.array([[0.0, 4095.0]], np.float32), "from 0.0 to 4095.0"),
    ],
)
def test_depths_of_unknown_range_are_refused(values, bounds):
    image = Image.fromarray(values)
    with pytest.raises(ValueError, match=f"{bounds} have no known range, expected 8 or 16 bits"):
        read_image(encode(image, "TIFF"))


def test_a_file_that_is_no_image_a_torn_one_and_a_huge_one_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="it is no image of a known format"):
        read_image(b"not an image")
    content = encode(Image.fromarray(CORNER), "JPEG")
    with pytest.raises(ValueError, match=r"(?i)truncated"):
        read_image(content[:-40])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"384 pixels.*exceeds limit"):
        read_image(content)


def test_a_format_that_pillow_passes_to_another_program_is_not_decoded():
    """Ghostscript would execute the program in a PostScript file, whatever the file is called."""
    content = BytesIO()
    Image.new("RGB", (8, 8)).save(content, "EPS")
    with pytest.raises(ValueError, match="it is no image of a known format"):
        read_image(content.getvalue())


@pytest.mark.parametrize("name", FORMATS)
def test_every_known_format_is_decoded(name):
    content = BytesIO()
    Image.new("L", (8, 6), 90).save(content, name)
    image = read_image(content.getvalue()).convert("L")
    assert image.size == (8, 6)
    assert abs(image.getpixel((3, 3)) - 90) <= 3
