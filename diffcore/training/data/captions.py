"""Captions of the images in a folder, from a metadata file or from a text file beside each image.

    metadata.jsonl    {"file_name": "cats/1.png", "text": "a cat"}     one line for each image
    metadata.csv      file_name,text                                   a header, and one row each
    cats/1.txt        a cat

File names are relative to the folder of the metadata file. Text files are read only if there is no
metadata file. An image has one caption.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffcore.training.data.listing import find_files, printable

__all__ = ["read_captions"]

COLUMN = "text"
METADATA = ("metadata.jsonl", "metadata.csv")


def read_captions(folder: str | Path, images: Sequence[str]) -> list[str]:
    """Read the captions of images.

    Args:
        folder: folder that is searched for metadata files.
        images: paths of the images below the folder.

    Returns:
        One caption for each image, in order; [] if no image has a caption.

    Raises:
        ValueError: Only some images have a caption, one has several, or a file cannot be read.
    """
    folder = Path(folder)
    files = [folder / name for name in find_files(folder) if os.path.basename(name) in METADATA]
    keys = [_absolute(f"{folder}/{name}") for name in images]
    captions = _read_metadata_files(files) if files else _read_text_files(keys)
    without = [
        printable(name) for name, key in zip(images, keys, strict=True) if key not in captions
    ]
    if captions and without:
        remedy = f"line in {files[0].name}" if files else ".txt file"
        raise ValueError(
            f"{len(without)} of the {len(images)} images of {folder} have no caption, such as "
            f"{without[0]}: give each a {remedy}, or set captions: false"
        )
    return [captions[key] for key in keys] if captions else []


def _read_text_files(images: Iterable[str]) -> dict[str, str]:
    """Absolute path of each image with a text file -> its caption."""
    texts = {path: Path(f"{os.path.splitext(path)[0]}.txt") for path in images}
    return {path: _read(text).strip() for path, text in texts.items() if text.is_file()}


def _read_metadata_files(files: Iterable[Path]) -> dict[str, str]:
    """Absolute path of each image -> its caption."""
    captions: dict[str, str] = {}
    origins: dict[str, str] = {}
    for file in files:
        for number, (path, text) in enumerate(_read_metadata(file), 1):
            origin = f"row {number} of {file}"
            if path in captions:
                raise ValueError(
                    f"{path} has two captions, in {origins[path]} and {origin}: keep one row for "
                    "each image"
                )
            captions[path], origins[path] = text, origin
    return captions


def _absolute(path: str | Path) -> str:
    """Absolute path of a file by the names of links, not of what they lead to."""
    return os.path.abspath(path)


def _read_metadata(file: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(_rows(file), 1):
        if None in row:  # csv puts the fields beyond the last column there
            raise ValueError(
                f"row {number} of {file} has more fields than the header: put double quotes "
                "around a caption that contains a comma"
            )
        name, text = row.get("file_name"), row.get(COLUMN)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"row {number} of {file} has no file_name or no {COLUMN}: each image's row needs "
                "both"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"row {number} of {file} has half of a surrogate pair, {text!a}, which is no "
                "character: write the text as UTF-8"
            )
        yield _absolute(file.parent / name), text.strip()


def _rows(file: Path) -> list[dict[str, object]]:
    text = _read(file)
    try:
        # Only "\n" ends a line of JSON, and a CSV field may contain any line break.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = (
            list(csv.DictReader(io.StringIO(text)))
            if file.suffix == ".csv"
            else [json.loads(line) for line in lines]
        )
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} has lines that are not JSON objects: expected file_name and {COLUMN} in each"
        )
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
