"""A cache of tensors by key, in safetensors shards: a run reads what an earlier run computed.

    folder/0b5c1e....safetensors     several entries; "<key>.<name>" is one tensor of an entry

A key is a hash of everything that the entry is computed from. An entry is therefore never out of
date: a changed image, another size or other weights of the encoder have another key.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffcore.io.files import CorruptFileError, hash_file
from diffcore.io.safetensors import check_header, read_weights, write_weights

__all__ = ["Cache", "Precision", "hash_content"]

SHARD = 256
"""Number of entries in a shard: what an interrupted computation loses at most."""

HALF = (torch.float16, torch.bfloat16)
Entry = Mapping[str, Tensor]


Precision = Literal["float32", "float16", "bfloat16"]


class Cache:
    """The cached entries of a folder.

    Args:
        folder: folder of the shards; it need not exist.
        dtype: data type in which tensors of two or more dimensions are stored; float32 stores all
            tensors as they are. Those of one dimension, such as sizes and pooled embeddings, are
            small, and rounding would change sizes.

    Raises:
        ValueError: A shard cannot be read, and the message contains its path; or the data type is
            another one.
    """

    def __init__(self, folder: str | Path, dtype: Precision = "float32") -> None:
        if dtype not in get_args(Precision):
            raise ValueError(
                f"dtype is {dtype!r}, expected one of {', '.join(get_args(Precision))}"
            )
        self.folder, self.dtype = Path(folder), dtype
        self.shards: dict[str, dict[str, Path]] = {}  # key -> name of a tensor -> shard
        self.rescan()

    def rescan(self) -> None:
        """Add the entries that other ranks or runs have written."""
        known = {path for tensors in self.shards.values() for path in tensors.values()}
        for path in sorted(set(self.folder.glob("*.safetensors")) - known):
            self._add(path, _open(path).keys())

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Find the keys that have no entry.

        Args:
            keys: keys, possibly several times.

        Returns:
            Each such key once, in order.
        """
        return [key for key in dict.fromkeys(keys) if key not in self.shards]

    def compute(
        self, keys: Sequence[str], entries: Callable[[Sequence[str]], Iterable[Entry]], what: str
    ) -> None:
        """Compute the entries of keys and write them, one shard after the other.

        Args:
            keys: keys without an entry.
            entries: computes the entries of some keys, in their order.
            what: noun for the progress bar.

        Raises:
            ValueError: A value is too large for the data type.
        """
        with tqdm(
            total=len(keys), desc=f"caching {what}", disable=not keys, mininterval=0.5
        ) as bar:
            for first in range(0, len(keys), SHARD):
                part = keys[first : first + SHARD]
                tensors: dict[str, Tensor] = {}
                for key, entry in zip(part, entries(part), strict=True):
                    tensors |= {
                        f"{key}.{name}": self._narrowed(value.cpu().clone(), what)
                        for name, value in entry.items()
                    }
                    bar.update()
                path = self.folder / f"{hash_content(*part)}.safetensors"
                self.folder.mkdir(parents=True, exist_ok=True)
                write_weights(path, tensors)
                self._add(path, tensors)

    def read(self, key: str) -> dict[str, Tensor]:
        """Read an entry.

        Args:
            key: key of an entry that is not missing.

        Returns:
            Its tensors by name, those in half precision as float32.

        Raises:
            ValueError: The shard is not what was written.
        """
        shards = self.shards[key]
        for path in shards.values():
            _verify(path)
        tensors = {name: _open(path).get_tensor(f"{key}.{name}") for name, path in shards.items()}
        return {
            name: value.float() if value.dtype in HALF else value for name, value in tensors.items()
        }

    def _narrowed(self, value: Tensor, what: str) -> Tensor:
        """A tensor in the data type of the cache."""
        if self.dtype == "float32" or value.ndim < 2 or not value.is_floating_point():
            return value
        narrowed = value.to(getattr(torch, self.dtype))
        if not torch.equal(narrowed.isfinite(), value.isfinite()):
            raise ValueError(
                f"the {what} have values up to {value.abs().max():.3g}, which {self.dtype} does "
                "not hold: set dtype: bfloat16, or float32"
            )
        return narrowed

    def _add(self, path: Path, tensors: Iterable[str]) -> None:
        for tensor in tensors:
            key, _, name = tensor.partition(".")
            self.shards.setdefault(key, {})[name] = path


def hash_content(*parts: str | Path) -> str:
    """Hash of texts and of the content of files.

    Args:
        parts: texts; files, hashed with their names; folders, of which all files are hashed.

    Returns:
        32 hexadecimal digits of SHA-256.
    """
    whole = hashlib.sha256()
    for part in parts:
        for text in [part] if isinstance(part, str) else map(_describe, _files(part)):
            # Names of files that are not UTF-8 contain surrogates.
            whole.update(f"{len(text)} {text}".encode(errors="surrogateescape"))
    return whole.hexdigest()[:32]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _describe(path: Path) -> str:
    return f"{path.name} {hash_file(path)}"


@cache
def _verify(path: Path) -> None:
    """Read a whole shard and compare its hash, once in each process."""
    try:
        read_weights(path)
    except CorruptFileError:
        raise ValueError(
            f"{path} of the cache is not what was written: delete it, and it is computed again"
        ) from None


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    """A shard whose tensors are read one by one."""
    try:
        check_header(path)
        return safe_open(path, "pt")
    except (SafetensorError, CorruptFileError, OSError) as error:
        raise ValueError(
            f"{path} of the cache cannot be read ({error}): delete it, and it is computed again"
        ) from None
