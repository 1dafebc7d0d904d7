"""Data sets, and the order in which a run sees them: a pure function of (seed, step), whatever the ranks and workers.

A data set is any map-style torch Dataset whose items are x_0, or (x_0, label): x_0 a float tensor of the process's shape
and range, label an integer.

It may also have `at(index, seed, position)`, the item as the visit at a position of the run sees it; `made`, whether items can
be read yet, and `make(device, first)`, called on every rank before training, after which they can; `texts`, what labels stand
for, and `asked(device)`, which makes of a network that is told text one that is asked by label; and `pictures(z)`, the
images of x_0 where it is a latent; and `content`, a hash of it all: a run is not resumed on another.
"""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from diffcore.core.noise import Stream, permutation, uniform
from diffcore.core.process import Process
from diffcore.io.extras import import_extra

HELD_OUT = 297
Fit = Literal["crop", "pad", "exact"]
Unreadable = Literal["refuse", "skip"]


class Digits(Dataset[tuple[Tensor, int]]):
    """The UCI handwritten digits that come with scikit-learn: 1797 real scans, 8x8, 10 classes, scaled to [-1, 1].

    The last 297 scans are held out; they are by other writers than most of the first 1500.

    Args:
        split: train (1500 scans) or test (297).
    """

    def __init__(self, split: Literal["train", "test"] = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}, expected train or test")
        bundled = import_extra("sklearn.datasets", "The digits data set")
        pixels, labels = bundled.load_digits(return_X_y=True)
        rows = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
        self.x0 = torch.tensor(pixels[rows] / 8 - 1, dtype=torch.float32).unflatten(1, (1, 8, 8))
        self.labels = torch.tensor(labels[rows])

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x0[index], int(self.labels[index])


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images of a folder, labelled by its sub-folders if it has any (in the order of their names), scaled to [-1, 1].

    Args:
        folder: read by Hugging Face datasets' "imagefolder".
        size: height and width of x_0.
        channels: RGB or L: every image is converted to it; transparency is dropped.
        fit: crop (scale the shorter side, cut the centre), pad (scale the longer, fill with black), or exact (refuse
            an image of another size).
        flip: whether to mirror left and right half of the time, keyed by the sample's position in the run.
        unreadable: refuse images that cannot be read, or skip them.

    Raises:
        ValueError: no images, or unreadable ones, counted and listed.
    """

    def __init__(
        self,
        folder: str,
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        unreadable: Unreadable = "refuse",
    ) -> None:
        _check_choices(channels=(channels, ("RGB", "L")), fit=(fit, get_args(Fit)))
        _check_choices(unreadable=(unreadable, get_args(Unreadable)))
        if size < 1:
            raise ValueError(f"size is {size}, expected pixels")
        self.size, self.channels, self.fit, self.flip = size, channels, fit, flip
        self.images = _readable(_load(Path(folder)), unreadable, folder)

    @property
    def classes(self) -> list[str]:
        """Names of the sub-folders; a label is a place in this list."""
        label = self.images.features.get("label")
        return list(label.names) if label else []

    @property
    def labels(self) -> list[int]:
        """Of the images."""
        return list(self.images["label"]) if self.classes else [0] * len(self)

    @property
    def paths(self) -> list[Path]:
        """Of the images."""
        return [Path(image["path"]) for image in self.images["image"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        pixels = np.array(self._fitted(_open(item["image"]).convert(self.channels)))
        x0 = torch.from_numpy(pixels).view(self.size, self.size, -1).permute(2, 0, 1)
        return x0.float() / 127.5 - 1, item.get("label", 0)

    def at(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The item as the visit at a position of the run sees it: mirrored, or not."""
        x0, label = self[index]
        return x0.flip(-1) if self.flip and mirrored(seed, position) else x0, label

    def _fitted(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        size = (self.size, self.size)
        if self.fit == "exact" and image.size != size:
            raise ValueError(
                f"an image is {image.size}, expected exactly {size}: use fit crop or pad"
            )
        fit = ImageOps.pad if self.fit == "pad" else ImageOps.fit
        return image if image.size == size else fit(image, size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch.

    Args:
        x0: (B, *shape).
        label: (B,), -1 where the data has none.
        index: (B,) where each stands in the data set.
        place: (B,) where each stands in the global batch.
    """

    x0: Tensor
    label: Tensor
    index: Tensor
    place: Tensor


class Order(Sampler[list[tuple[int, int]]]):
    """The (index, position) pairs of each micro-batch of this rank: position is the place in the whole run.

    Every epoch is a keyed permutation; part p of rank r of step s takes the places (p·world + r)·micro + j of the global
    batch, so the batch is the same for every split of it.
    """

    def __init__(
        self, size: int, seed: int, batch: int, accumulation: int, rank: int, world: int
    ) -> None:
        self.size, self.seed, self.batch = size, seed, batch
        self.micro = batch // (accumulation * world)
        self.parts = [(part * world + rank) * self.micro for part in range(accumulation)]
        self.span = range(0)
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: permutation(seed, epoch, size).tolist()
        )

    def steps(self, start: int, stop: int) -> "Order":
        """This order over the optimizer steps from start to stop."""
        self.span = range(start, stop)
        return self

    def index(self, position: int) -> int:
        """The item at a position of the run."""
        epoch, place = divmod(position, self.size)
        return int(self._permutation(epoch)[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.span:
            for first in self.parts:
                positions = range(step * self.batch + first, step * self.batch + first + self.micro)
                yield [(self.index(position), position) for position in positions]

    def __len__(self) -> int:
        return len(self.span) * len(self.parts)


class Positioned(Dataset[tuple[Tensor, int, int, int]]):
    """A data set asked for (index, position): what is random about an item depends on its position alone."""

    def __init__(self, data: Dataset[Any], seed: int, batch: int) -> None:
        self.data, self.seed, self.batch = data, seed, batch

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, int]:
        index, position = key
        at: Callable[[int, int, int], Any] | None = getattr(self.data, "at", None)
        x0, label = split(self.data[index] if at is None else at(index, self.seed, position))
        return x0, label, index, position % self.batch


def batches(data: Dataset[Any], order: Order, workers: int) -> Iterator[Batch]:
    """The micro-batches of an order, read by `workers` processes (0: this one)."""
    loader = DataLoader(
        Positioned(data, order.seed, order.batch),
        batch_sampler=order,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return (Batch(*columns) for columns in loader)


def mirrored(seed: int, position: int) -> bool:
    """Whether the visit at a position of the run sees its image mirrored: half of them do."""
    return bool(uniform(seed, Stream.AUGMENT, position) < 0.5)


def split(item: Any) -> tuple[Tensor, int]:
    """(x_0, label) of an item; -1 where it has no label."""
    return (item[0], int(item[1])) if isinstance(item, (tuple, list)) else (item, -1)


def size_of(data: Dataset[Any]) -> int:
    """The number of items; a data set that cannot say it is not map-style."""
    if not isinstance(data, Sized):
        raise ValueError(
            f"{type(data).__name__} has no length: expected a map-style data set (__len__ and __getitem__)"
        )
    if not len(data):
        raise ValueError(f"{type(data).__name__} is empty")
    return len(data)


def conditioned(process: Process, data: Dataset[Any]) -> Process:
    """The process with as many classes as the data has texts.

    Raises:
        ValueError: it says another number, or drops a condition that there is not.
    """
    if texts := getattr(data, "texts", ()):
        if process.classes not in (0, len(texts)):
            raise ValueError(
                f"classes is {process.classes}, but the data has {len(texts)} captions: leave classes out"
            )
        process = replace(process, classes=len(texts))
    if process.dropout and not process.classes:
        raise ValueError(
            f"dropout is {process.dropout}, but the data has no captions and classes is 0: there is no condition to drop; "
            f"set dropout: 0"
        )
    return process


def check(data: Dataset[Any], process: Process) -> None:
    """Raise where the first item does not fit the process; one that is not made yet is not looked at."""
    size_of(data)
    if not getattr(data, "made", True):
        return
    x0, label = split(data[0])
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or tuple(x0.shape) != process.shape:
        found = (
            f"{x0.dtype} of shape {tuple(x0.shape)}"
            if isinstance(x0, Tensor)
            else type(x0).__name__
        )
        raise ValueError(
            f"an item of the data is {found}, expected a float tensor of the process's shape {process.shape}"
        )
    if x0.min() < process.low - 1e-6 or x0.max() > process.high + 1e-6:
        raise ValueError(
            f"an item of the data lies in [{float(x0.min()):g}, {float(x0.max()):g}], expected within the process's range "
            f"[{process.low:g}, {process.high:g}]: scale the data, or set process.low and process.high"
        )
    check_labels(
        Batch(x0[None], torch.tensor([label]), torch.tensor([0]), torch.tensor([0])), process
    )


def make(data: Dataset[Any], process: Process, device: torch.device, first: bool) -> None:
    """Let the data make what items are read from, and look at one of them."""
    if hasattr(data, "make"):
        data.make(device, first)
        check(data, process)


def hashes(**parts: Any) -> dict[str, str]:
    """What a checkpoint says of the data and of the network's frozen weights, where they say it themselves."""
    return {name: part.content for name, part in parts.items() if hasattr(part, "content")}


def asked(data: Dataset[Any], device: torch.device) -> Callable[[nn.Module], nn.Module]:
    """Makes of a network one that is asked by the data's labels."""
    return data.asked(device) if hasattr(data, "asked") else lambda network: network


def check_labels(batch: Batch, process: Process) -> None:
    """Raise where a label is none of the process's: the null label in the data would train the wrong condition."""
    wrong = (batch.label < 0) | (batch.label >= process.classes)
    if process.classes and wrong.any():
        index, label = int(batch.index[wrong][0]), int(batch.label[wrong][0])
        raise ValueError(
            f"item {index} of the data has label {label}, expected 0 .. {process.classes - 1}: set process.classes to the "
            f"number of classes"
        )


def _load(folder: Path) -> Any:
    datasets = import_extra("datasets", "A folder of images as a data set")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: expected one with images, in sub-folders by class if they have one"
        )
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    files = sorted(
        str(path.resolve()) for path in folder.rglob("*") if path.suffix.lower() in suffixes
    )
    if not files:
        raise ValueError(
            f"{folder} holds no images: expected files ending in {', '.join(sorted(suffixes))}"
        )
    datasets.disable_progress_bars()
    # Named files, or datasets takes a folder or file called "test" for a split and leaves it out.
    images = datasets.load_dataset("imagefolder", data_files={"train": files}, split="train")
    return images.cast_column("image", datasets.Image(decode=False))


def _readable(images: Any, policy: str, folder: str) -> Any:
    broken = [place for place, item in enumerate(images) if not _reads(item["image"])]
    if not broken:
        return images
    names = ", ".join(Path(images[place]["image"]["path"]).name for place in broken[:10])
    found = f"{folder} has {len(broken)} unreadable of {len(images)} images: {names}{', ...' if len(broken) > 10 else ''}"
    if policy == "refuse" or len(broken) == len(images):
        raise ValueError(f"{found}; mend or delete them, or set unreadable: skip")
    print(f"{found}; skipped")
    return images.select([place for place in range(len(images)) if place not in set(broken)])


def _open(image: dict[str, Any]) -> Any:
    """The decoded image, 8 bits a channel."""
    from PIL import Image

    with Image.open(BytesIO(image["bytes"] or Path(image["path"]).read_bytes())) as opened:
        opened.load()
        deep = opened.mode.startswith("I")  # 16 bits: Pillow's own conversion cuts at 255
        return (
            Image.fromarray((np.asarray(opened) / 257).round().astype(np.uint8))
            if deep
            else opened.copy()
        )


def _reads(image: dict[str, Any]) -> bool:
    try:
        _open(image)
    except Exception:  # Pillow raises many kinds for a file that is no image
        return False
    return True


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
