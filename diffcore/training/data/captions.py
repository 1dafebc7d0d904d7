"""Captions of the images in a folder, from a metadata file or from a text file beside each image.

    metadata.jsonl    {"file_name": "cats/1.png", "text": "a cat"}     one line for each image
    metadata.csv      file_name,text                                   a header, and one row each
    cats/1.txt        a cat

File names are relative to the folder of the metadata file, like in the "imagefolder" builder of the
datasets library.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["read_captions"]

COLUMN = "text"


def read_captions(folder: str | Path, images: Sequence[str | Path]) -> list[str]:
    """Read the captions of images.

    Args:
        folder: folder that is searched for metadata files.
        images: paths of the images.

    Returns:
        One caption for each image, in order; [] if no image has a caption.

    Raises:
        ValueError: Only some images have a caption, or a file cannot be read.
    """
    folder, paths = Path(folder), [Path(path) for path in images]
    files = sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")])
    captions = (
        {path: text for file in files for path, text in _read_metadata(file)}
        if files
        else _read_text_files(paths)
    )
    without = [path.name for path in paths if path not in captions]
    if captions and without:
        remedy = f"line in {files[0].name}" if files else ".txt file"
        raise ValueError(
            f"{len(without)} of the {len(paths)} images of {folder} have no caption, such as "
            f"{without[0]}: give each a {remedy}, or set captions: false"
        )
    return [captions[path] for path in paths] if captions else []


def _read_text_files(images: Iterable[Path]) -> dict[Path, str]:
    texts = {path: path.with_suffix(".txt") for path in images}
    return {path: _read(text).strip() for path, text in texts.items() if text.is_file()}


def _read_metadata(file: Path) -> Iterator[tuple[Path, str]]:
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
        text = _read(file)
        # Only "\n" ends a line of JSON, and a CSV field may contain any line break.
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
            f"{file} has lines that are not JSON objects: expected file_name and {COLUMN} in each"
        )
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
