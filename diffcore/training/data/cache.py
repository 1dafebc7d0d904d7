"""A cache of tensors by key, in safetensors shards: what one run encoded, later runs read.

    folder/0b5c1e....safetensors     some entries: "<key>.<name>" is one tensor

A key is a hash of everything that an entry is made of, so that no entry is out of date: a changed
image, another size or other weights of the encoder have another key.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffcore.io.files import CorruptFileError, hash_file
from diffcore.io.safetensors import read_weights, write_weights

__all__ = ["Cache", "digest"]

SHARD = 256
"""Number of entries in a shard; an interrupted build loses at most as many."""

Entry = Mapping[str, Tensor]


class Cache:
    """The entries of a folder.

    Args:
        folder: folder of the shards; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, dict[str, Path]] = {}
        self.rescan()

    def rescan(self) -> None:
        """Find the entries that other processes have written."""
        known = {path for place in self.places.values() for path in place.values()}
        for path in sorted(set(self.folder.glob("*.safetensors")) - known):
            self._add(path, _open(path).keys())

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys without an entry, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def make(
        self, keys: Sequence[str], entries: Callable[[Sequence[str]], Iterable[Entry]], what: str
    ) -> None:
        """Compute and write the entries of keys; each shard is written atomically.

        Args:
            keys: keys without an entry.
            entries: computes the entries of some keys, in order.
            what: plural noun for the progress bar.
        """
        with tqdm(
            total=len(keys), desc=f"caching {what}", disable=not keys, mininterval=0.5
        ) as bar:
            for first in range(0, len(keys), SHARD):
                part = keys[first : first + SHARD]
                tensors: dict[str, Tensor] = {}
                for key, entry in zip(part, entries(part), strict=True):
                    tensors |= {
                        f"{key}.{name}": value.cpu().clone() for name, value in entry.items()
                    }
                    bar.update()
                path = self.folder / f"{digest(*part)}.safetensors"
                self.folder.mkdir(parents=True, exist_ok=True)
                write_weights(path, tensors)
                self._add(path, tensors)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, by name.

        Raises:
            ValueError: Its shard is not what was written; delete it.
        """
        for path in self.places[key].values():
            _verify(path)
        return {
            name: _open(path).get_tensor(f"{key}.{name}") for name, path in self.places[key].items()
        }

    def _add(self, path: Path, tensors: Iterable[str]) -> None:
        for tensor in tensors:
            key, _, name = tensor.partition(".")
            self.places.setdefault(key, {})[name] = path


def digest(*parts: str | Path) -> str:
    """Hash (32 hexadecimal digits) of texts, and of the names and contents of files or of all files
    below a folder.
    """
    whole = hashlib.sha256()
    for part in parts:
        for text in [part] if isinstance(part, str) else map(_described, _files(part)):
            whole.update(f"{len(text)} {text}".encode())
    return whole.hexdigest()[:32]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _described(path: Path) -> str:
    return f"{path.name} {hash_file(path)}"


@cache
def _verify(path: Path) -> None:
    """Read a whole shard once in each process, and compare its hash."""
    try:
        read_weights(path)
    except CorruptFileError:
        raise ValueError(
            f"{path} of the cache is not what was written: delete it, and it is computed again"
        ) from None


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    """An open shard, whose tensors are read on demand."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} of the cache cannot be read ({error}): delete it, and it is computed again"
        ) from None
