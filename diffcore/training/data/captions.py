"""Captions of a folder's images: in a metadata file, as Hugging Face datasets' "imagefolder" has
them, or beside each image.

metadata.jsonl   {"file_name": "cats/1.png", "text": "a cat"}     a line an image, named from the
file's own folder metadata.csv     file_name,text cats/1.txt       a cat
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

COLUMN = "text"


def captions(folder: Path, images: Sequence[Path]) -> list[str]:
    """The caption of each image, or none at all where the folder has no captions.

    Raises:
        ValueError: some images have a caption and others none, or a metadata file cannot be read.
    """
    files = sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")])
    said = (
        {path: text for file in files for path, text in _metadata(file)}
        if files
        else _beside(images)
    )
    bare = [path.name for path in images if path not in said]
    if not said or not bare:
        return [said[path] for path in images] if said else []
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
