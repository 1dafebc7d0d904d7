"""Files of samples: a folder with one file for each sample, one picture, or arrays."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffcore.core.process import Process
from diffcore.io.files import write_file
from diffcore.io.plain_data import read_json
from diffcore.io.safetensors import hash_tensors, write_weights
from diffcore.sampling import images

__all__ = [
    "ARRAY_SUFFIXES",
    "FolderWriter",
    "SampleKey",
    "SampleWriter",
    "WholeWriter",
    "hash_networks",
    "write_arrays",
]

ARRAY_SUFFIXES = (".safetensors", ".npz", ".npy")
RECORD = "sampling.json"
"""File beside the images of a folder that holds the settings with which they were drawn."""


class SampleKey(NamedTuple):
    """What a sample is a function of, for given settings.

    Args:
        label: class label, index of a prompt, or null label.
        seed: seed of the noise.
        row: index of its value of the named conditions, if these have several.
    """

    label: int
    seed: int
    row: int = 0


class SampleWriter(ABC):
    """Receives samples in chunks and writes them."""

    def missing(self, keys: Sequence[SampleKey]) -> list[SampleKey]:
        """The samples that are not written yet.

        Args:
            keys: samples to write.

        Returns:
            Those without a file, in their order; by default all.
        """
        return list(keys)

    @abstractmethod
    def add(self, keys: Sequence[SampleKey], x: Tensor) -> None:
        """Receive some samples.

        Args:
            keys: their labels and seeds.
            x: (N, *shape) samples on the host.
        """

    def finish(self) -> None:  # noqa: B027
        """Write what is written only after the last sample; by default nothing."""


@dataclass
class WholeWriter(SampleWriter):
    """Collects all samples in memory and writes one file.

    Args:
        write: receives the labels and seeds, and all samples (N, *shape).
    """

    write: Callable[[list[SampleKey], Tensor], None]
    keys: list[SampleKey] = field(default_factory=list)
    chunks: list[Tensor] = field(default_factory=list)

    def add(self, keys: Sequence[SampleKey], x: Tensor) -> None:
        self.keys += keys
        self.chunks.append(x)

    def finish(self) -> None:
        if self.chunks:
            self.write(self.keys, torch.cat(self.chunks))


@dataclass(frozen=True)
class FolderWriter(SampleWriter):
    """Writes one file for each sample as soon as it is drawn, so that a restart continues.

    Images are .png files, and other samples arrays of their shape in .npy files. Samples that are
    not finite get no file.

    Args:
        folder: folder to write; it may hold samples of the same settings. A string becomes a Path.
        process: process with the shape and the range of the samples.
        condition: "label" or "prompt", the beginning of the names; "": names without a label.
        settings: plain data on which the samples depend, apart from label and seed.
        has_values: whether the named conditions have several values, which the names contain.
    """

    folder: Path
    process: Process
    condition: str
    settings: Mapping[str, Any]
    has_values: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def path(self, key: SampleKey) -> Path:
        """The file of a sample."""
        prefix = f"{self.condition}-{key.label}-" if self.condition else ""
        prefix += f"value-{key.row}-" if self.has_values else ""
        suffix = ".png" if images.is_image(self.process) else ".npy"
        return self.folder / f"{prefix}seed-{key.seed}{suffix}"

    def prepare(self, keys: Sequence[SampleKey]) -> None:
        """Check that each sample has a file of its own, and write the settings beside the files.

        Args:
            keys: samples of all ranks.

        Raises:
            ValueError: two samples would share a file, or the folder holds samples of other
                settings.
        """
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise ValueError(
                f"seed {repeated[0].seed} is repeated, and a folder holds one file for each label "
                "and seed: leave the repetition out, or write .npz"
            )
        record = self.folder / RECORD
        # Before the record: another rank writes the record first, and then samples.
        existing = [path.name for path in map(self.path, keys) if path.exists()]
        if record.is_file():
            self._check_record(record)
        elif existing:
            raise ValueError(
                f"{self.folder} holds {existing[0]}, and no {RECORD} with the settings it was "
                "drawn with: name another folder"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.settings, indent=2, ensure_ascii=False)
            write_file(record, (text + "\n").encode())

    def missing(self, keys: Sequence[SampleKey]) -> list[SampleKey]:
        return [key for key in keys if not self.path(key).exists()]

    def add(self, keys: Sequence[SampleKey], x: Tensor) -> None:
        finite = x.flatten(1).isfinite().all(1)
        kept = [key for key, is_finite in zip(keys, finite.tolist(), strict=True) if is_finite]
        if not images.is_image(self.process):
            for key, sample in zip(kept, x[finite], strict=True):
                write_arrays(self.path(key), [key], sample)
            return
        for key, pixels in zip(kept, images.to_pixels(x[finite], self.process), strict=True):
            images.save_image(images.to_image(pixels), self.path(key))

    def _check_record(self, record: Path) -> None:
        written, own = read_json(record), json.loads(json.dumps(self.settings))
        changed = sorted(name for name in {*written, *own} if written.get(name) != own.get(name))
        if changed:
            raise ValueError(
                f"{self.folder} holds samples of other settings ({', '.join(changed)} differ from "
                f"{RECORD}): name another folder, or use the same settings"
            )


def write_arrays(path: str | Path, keys: Sequence[SampleKey], x: Tensor) -> None:
    """Write samples as arrays: `x`, `seed` and `label`, or `x` alone in a .npy file.

    Args:
        path: file to write, of a suffix in `ARRAY_SUFFIXES`; its folder is created.
        keys: label and seed of each sample.
        x: (N, *shape) samples on the host.

    Raises:
        WriteError: The file cannot be written; an older one of this name is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = torch.tensor([key.seed for key in keys])
    labels = torch.tensor([key.label for key in keys])
    if path.suffix == ".safetensors":
        write_weights(path, {"x": x, "seed": seeds, "label": labels})
        return
    content = BytesIO()  # numpy truncates a file on a full disk without an error
    if path.suffix == ".npy":
        np.save(content, x.numpy())
    else:
        np.savez(content, x=x.numpy(), seed=seeds.numpy(), label=labels.numpy())
    write_file(path, content.getvalue())


def hash_networks(networks: Sequence[nn.Module]) -> str:
    """SHA-256 of the weights of networks.

    Args:
        networks: networks on any device.

    Returns:
        64 hexadecimal digits.
    """
    return hash_tensors(*(network.state_dict() for network in networks))  # may hold other state
