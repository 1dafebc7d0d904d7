"""Hugging Face data sets of images: saved ones, parquet files, and those of a hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore.io.extras import import_extra
from diffcore.io.images.pixels import Fit
from diffcore.io.images.reader import read_content
from diffcore.training.data.arrays.shards import find_shards, hash_shards
from diffcore.training.data.cache import hash_content
from diffcore.training.data.collections.images import (
    ImageCollection,
    ImageOptions,
    as_classes,
    as_label,
    check_condition,
)
from diffcore.training.data.collections.streams import EncodedImage, Restart, StreamSource
from diffcore.training.data.listing import printable

__all__ = ["HuggingFaceData", "HuggingFaceStream"]

FORMATS = ("arrow", "imagefolder", "parquet", "webdataset")
"""Formats of a hub's data sets that are read; some others run code or unpickle."""
HASHED = 256
"""Number of images, evenly spread, that are hashed."""
SAVED = ("dataset_info.json", "dataset_dict.json")


class HuggingFaceData(ImageCollection):
    """The images of a map-style Hugging Face data set; items are read in any order.

    Args:
        path: folder that `Dataset.save_to_disk` wrote; a .parquet file, a folder of them or a glob
            pattern; or OWNER/NAME of a data set of a hub. In Python also a `datasets.Dataset`.
        size: height and width of x_0 in pixels.
        split: split of a saved `DatasetDict` or of a hub's data set, such as train.
        image: column of the images.
        label: column of the labels, integers or texts; "" for data without labels.
        caption: column of the captions; the labels are then indices into the distinct captions.
            "" for none.
        channels: RGB or L; every image is converted to it.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.

    Raises:
        ValueError: There is no such data set, split or column, a column has another type, or both
            label and caption are set.
        MissingExtraError: The package `datasets` is not installed.
    """

    def __init__(
        self,
        path: str | Any,
        size: int,
        split: str = "train",
        image: str = "image",
        label: str = "",
        caption: str = "",
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
    ) -> None:
        options = ImageOptions(size, channels, fit, flip)
        check_condition(label, caption)
        data = _load(path, split, False)
        columns = _columns(data, image, label or caption)
        self.data, self.column = data.select_columns(columns), image
        if not len(data):
            raise ValueError("the data set is empty")
        names: tuple[str, ...] | None = None if caption else ()
        texts: tuple[str, ...] = ()
        labels = torch.full((len(data),), -1)
        if label:
            names, labels = _labels(self.data, label)
        elif caption:
            texts, labels = as_classes(_texts(self.data, caption))
        self.data = _undecoded(self.data.select_columns([image]), image)
        super().__init__(options, labels, names, texts)

    def _read(self, index: int) -> tuple[bytes, str]:
        name = f"row {index}"
        return _content(self.data[index][self.column], name), name

    @property
    def content_hash(self) -> str:
        """Hash of the options, the labels, 256 images, and a part of each file (`hash_shards`)."""
        rows = sorted({i * len(self) // HASHED for i in range(HASHED)})
        images = [hash_content(self._read(row)[0].hex()) for row in rows]
        files = [entry["filename"] for entry in self.data.cache_files]
        hashed = hash_shards(files) if files else ""
        labels = str(self.labels.tolist())
        return hash_content(str(self.options), labels, *self.texts, *images, hashed)


class HuggingFaceStream(StreamSource):
    """The images of a Hugging Face data set that is read forwards, without a copy on the disk.

    Use `HuggingFaceData` for data that fits on a disk.

    Args:
        path: a .parquet file, a folder of them or a glob pattern; or OWNER/NAME of a data set of a
            hub. In Python also a `datasets.IterableDataset`.
        size: height and width of x_0 in pixels.
        split: split of a hub's data set, such as train.
        image: column of the images.
        label: column of the integer labels; "" for data without labels.
        channels: RGB or L; every image is converted to it.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        window: number of samples that are shuffled among each other, and held in memory encoded,
            for each lane.
        lanes: number of sequences of files that are read side by side, see `TarStream`.
        turn: number of consecutive samples that a lane supplies, see `TarStream`.
        restart: reread (a resumed run reads the files again up to its position, and continues
            exactly) or renew (it begins new epochs, so that samples of the interrupted epoch are
            repeated or left out).

    Raises:
        ValueError: There is no such data set, split or column, or a number is out of range.
        MissingExtraError: The package `datasets` is not installed.
    """

    def __init__(
        self,
        path: str | Any,
        size: int,
        split: str = "train",
        image: str = "image",
        label: str = "",
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        window: int = 1024,
        lanes: int = 1,
        turn: int = 16,
        restart: Restart = "reread",
    ) -> None:
        options = ImageOptions(size, channels, fit, flip)
        data = _load(path, split, True)
        self.data = _undecoded(data.select_columns(_columns(data, image, label)), image)
        self.columns, self.path = (image, label), path if isinstance(path, str) else ""
        super().__init__(options, data.num_shards, window, lanes, turn, restart)
        feature = (data.features or {}).get(label)
        names = getattr(feature, "names", None)
        self.class_names = () if not label else names and tuple(names)

    def _read_shard(self, shard: int) -> Iterator[EncodedImage]:
        image, label = self.columns
        rows = self.data.shard(num_shards=self.shards, index=shard)
        for number, row in enumerate(rows):
            name = f"row {number} of shard {shard}"
            value = as_label(row[label], name) if label else -1
            yield EncodedImage(_content(row[image], name), value, name)

    def _identity(self) -> tuple[str, ...]:
        is_local = Path(self.path).exists() or "*" in self.path
        files = [file.name for file in find_shards(self.path, ".parquet")] if is_local else []
        return (str(self.columns), *(files or [self.path]))


def _load(path: Any, split: str, is_stream: bool) -> Any:
    """The data set that a path names, or the object itself.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    datasets = import_extra("datasets", "A Hugging Face data set")
    expected = datasets.IterableDataset if is_stream else datasets.Dataset
    if not isinstance(path, (str, Path)):
        if not isinstance(path, expected):
            raise ValueError(f"path is a {type(path).__name__}, expected {expected.__name__}")
        return path
    try:
        data = _read(datasets, str(path), split, is_stream)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{printable(path)} cannot be read as a data set: {reason}") from None
    if not isinstance(data, expected):
        raise ValueError(f"{printable(path)} holds the splits {', '.join(data)}: set split")
    return data


def _read(datasets: Any, path: str, split: str, is_stream: bool) -> Any:
    folder = Path(path)
    if any((folder / name).is_file() for name in SAVED):
        data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"it has the splits {', '.join(data)}, but split is {split!r}")
            data = data[split]
        return data.to_iterable_dataset() if is_stream else data
    if folder.exists() or "*" in path:
        files = [str(file) for file in find_shards(path, ".parquet")]
        return datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=is_stream
        )
    if len(folder.parts) != 2 or path.startswith((".", "~")):
        raise ValueError("there is no such file or folder, and it is not OWNER/NAME of a hub")
    builder = datasets.load_dataset_builder(path)
    name = type(builder).__module__.rpartition(".")[2]
    if name not in FORMATS:
        raise ValueError(f"its format is {name}, expected one of {', '.join(FORMATS)}")
    return datasets.load_dataset(path, split=split, streaming=is_stream)


def _columns(data: Any, image: str, label: str) -> list[str]:
    """The columns that are read.

    Raises:
        ValueError: One of them does not exist.
    """
    names = data.column_names
    for name in filter(None, (image, label)):
        if names is not None and name not in names:
            raise ValueError(
                f"the data set has no column {name!r}, but {', '.join(names)}: set image, label or "
                "caption to one of them"
            )
    return [image, *([label] if label else [])]


def _undecoded(data: Any, image: str) -> Any:
    """The data with the bytes of the images in place of pixels."""
    datasets = import_extra("datasets", "A Hugging Face data set")
    feature = (data.features or {}).get(image)
    if feature is not None and not isinstance(feature, datasets.Image):
        raise ValueError(
            f"column {image!r} is {feature}, expected images: set image to their column, or save "
            "numbers as .npy files for the data set Arrays"
        )
    return data.cast_column(image, datasets.Image(decode=False)) if feature is not None else data


def _labels(data: Any, column: str) -> tuple[tuple[str, ...] | None, Tensor]:
    """Names of the classes, or None if they are unknown, and (N,) labels."""
    feature = data.features[column]
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        return as_classes(_texts(data, column))
    values = _values(data, column)
    try:
        labels = torch.tensor(values.to_pylist(), dtype=torch.int64)
        is_integer = str(values.type).startswith(("int", "uint"))
    except (TypeError, ValueError, RuntimeError):
        is_integer = False
    if not is_integer or labels.ndim != 1:
        raise ValueError(f"column {column!r} is {feature}, expected integers or texts")
    return (tuple(feature.names) if hasattr(feature, "names") else None), labels


def _texts(data: Any, column: str) -> list[str]:
    values = _values(data, column).to_pylist()
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {column!r} is {data.features[column]}, expected texts")
    return values


def _values(data: Any, column: str) -> Any:
    """The values of a column as an array of pyarrow.

    Raises:
        ValueError: One is missing.
    """
    values = data.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        raise ValueError(f"column {column!r} lacks {values.null_count} of {len(values)} values")
    return values


def _content(value: Any, name: str) -> bytes:
    """The bytes of an encoded image.

    Raises:
        ValueError: There are none.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        content: bytes = value["bytes"]
        return content
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return read_content(value["path"])
    raise ValueError(f"{name} has no image, but {type(value).__name__}")
