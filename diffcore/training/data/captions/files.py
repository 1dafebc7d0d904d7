"""Captions of the images in a folder, from metadata files or from files beside each image.

    metadata.jsonl      {"file_name": "cats/1.png", "text": "a cat"}   a line for each caption
    metadata.csv        file_name,text                                 a header, and rows
    metadata.parquet    the columns file_name and text
    cats/1.txt          a cat
    cats/1.json         {"text": "a cat"}, or a text, or a list of texts

File names are relative to the folder of the metadata file. Files beside an image are read only if
no metadata file has a row for it. An image has several captions if it has several rows, or if
`text` is a list, or if it has both a .txt and a .json file.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffcore.io.extras import import_extra
from diffcore.training.data.listing import find_files, printable

__all__ = ["read_captions"]

COLUMN = "text"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_KEYS = ("text", "caption", "captions")
"""Keys of a .json file beside an image, the first of which is read."""


def read_captions(folder: str | Path, images: Sequence[str]) -> list[tuple[str, ...]]:
    """Read the captions of images.

    Args:
        folder: folder that is searched for metadata files.
        images: paths of the images below the folder.

    Returns:
        The distinct captions of each image, in order; [] if no image has a caption.

    Raises:
        ValueError: Only some images have a caption, no row of the metadata files is of one of the
            images, or a file cannot be read.
    """
    folder = Path(folder)
    files = [folder / name for name in find_files(folder) if os.path.basename(name) in METADATA]
    keys = [_absolute(f"{folder}/{name}") for name in images]
    rows = _read_metadata_files(files)
    captions = [tuple(dict.fromkeys(rows.get(key) or _read_beside(key))) for key in keys]
    without = [name for name, found in zip(images, captions, strict=True) if not found]
    if without and len(without) < len(images):
        remedy = f"line in {files[0].name}" if files else ".txt file"
        raise ValueError(
            f"{len(without)} of the {len(images)} images of {folder} have no caption, such as "
            f"{printable(without[0])}: give each a {remedy}, or set captions: false"
        )
    if without and rows:
        raise ValueError(
            f"none of the {len(rows)} files that {printable(files[0])} names is an image of "
            f"{folder}, such as {printable(next(iter(rows)))}: give file_name relative to the "
            "folder of the metadata file, or set captions: false"
        )
    return [] if without else captions


def _read_beside(image: str) -> list[str]:
    """The captions in the files beside an image."""
    text, data = (Path(f"{os.path.splitext(image)[0]}{suffix}") for suffix in (".txt", ".json"))
    captions = [_read(text).strip()] if text.is_file() else []
    return captions + (_read_json(data) if data.is_file() else [])


def _read_json(file: Path) -> list[str]:
    """The captions in a .json file: a text, a list of texts, or an object with one of them."""
    try:
        content = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if isinstance(content, dict):
        content = next((content[key] for key in CAPTION_KEYS if key in content), None)
    texts = _as_texts(content)
    if texts is None:
        raise ValueError(
            f"{file} holds no caption: expected a text, a list of texts, or an object with one of "
            f"them as {', '.join(CAPTION_KEYS)}"
        )
    return _checked(texts, str(file))


def _as_texts(value: object) -> list[str] | None:
    """A text, or a list of at least one text, as a list; None for anything else."""
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    return texts if texts and len(texts) == len(values) else None


def _checked(texts: list[str], origin: str) -> list[str]:
    """The texts without outer white space; raise ValueError for half of a surrogate pair."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{origin} has half of a surrogate pair, {text!a}, which is no character: write "
                "the text as UTF-8"
            )
    return [text.strip() for text in texts]


def _read_metadata_files(files: Iterable[Path]) -> dict[str, list[str]]:
    """Absolute path of each image with a row -> its captions."""
    captions: dict[str, list[str]] = {}
    for file in files:
        for path, texts in _read_metadata(file):
            captions.setdefault(path, []).extend(texts)
    return captions


def _absolute(path: str | Path) -> str:
    """Absolute path of a file by the names of links, not of what they lead to."""
    return os.path.abspath(path)


def _read_metadata(file: Path) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(_rows(file), 1):
        if None in row:  # csv puts the fields beyond the last column there
            raise ValueError(
                f"row {number} of {file} has more fields than the header: put double quotes "
                "around a caption that contains a comma"
            )
        name, texts = row.get("file_name"), _as_texts(row.get(COLUMN))
        if not isinstance(name, str) or texts is None:
            raise ValueError(
                f"row {number} of {file} has no file_name or no {COLUMN}: each image's row needs "
                "both"
            )
        yield _absolute(file.parent / name), _checked(texts, f"row {number} of {file}")


def _rows(file: Path) -> list[dict[str, object]]:
    if file.suffix == ".parquet":
        return _parquet_rows(file)
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


def _parquet_rows(file: Path) -> list[dict[str, object]]:
    parquet = import_extra("pyarrow.parquet", "A caption file metadata.parquet", "data")
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    columns = [name for name in ("file_name", COLUMN) if name in table.column_names]
    rows: list[dict[str, object]] = table.select(columns).to_pylist()
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
