"""Captions of the images of a folder: from metadata files, or from a text file beside each image.

    metadata.jsonl   {"file_name": "cats/1.png", "text": "a cat"}    one line for each image
    metadata.csv     file_name,text                                  one row for each image
    cats/1.txt       a cat                                           beside cats/1.png

A metadata file has the format of the "imagefolder" builder of datasets: file names are relative to its folder.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["read_captions"]

COLUMN = "text"


def read_captions(folder: Path, images: Sequence[Path]) -> list[str]:
    """Read the captions of images.

    Args:
        folder: folder that is searched for metadata files.
        images: paths of the images.

    Returns:
        One caption for each image; empty if the folder has no captions.

    Raises:
        ValueError: Only some images have a caption, or a metadata file cannot be read.
    """
    files = sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")])
    found = (
        {path: text for file in files for path, text in _metadata(file)}
        if files
        else _beside(images)
    )
    bare = [path.name for path in images if path not in found]
    if not found or not bare:
        return [found[path] for path in images] if found else []
    raise ValueError(
        f"{len(bare)} of the {len(images)} images of {folder} have no caption, such as {bare[0]}: "
        "give each a "
        f"{'line in ' + files[0].name if files else '.txt file'}, or set captions: false"
    )


def _beside(images: Iterable[Path]) -> dict[Path, str]:
    texts = {path: path.with_suffix(".txt") for path in images}
    return {path: _read(text).strip() for path, text in texts.items() if text.is_file()}


def _metadata(file: Path) -> Iterator[tuple[Path, str]]:
    for number, row in enumerate(_rows(file), 1):
        name, text = row.get("file_name"), row.get(COLUMN)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"row {number} of {file} has no file_name or no {COLUMN}: each image's row needs "
                "both"
            )
        yield (file.parent / name).resolve(), text.strip()


def _rows(file: Path) -> list[dict[str, object]]:
    try:
        text = _read(
            file
        )  # a caption may hold any line break but the file's own, and in CSV that too
        lines = [line for line in text.split("\n") if line.strip()]
        rows = (
            list(csv.DictReader(io.StringIO(text)))
            if file.suffix == ".csv"
            else [json.loads(line) for line in lines]
        )
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} holds lines that are no objects: expected file_name and {COLUMN} in each"
        )
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
