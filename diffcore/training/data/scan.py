"""The scan of an image folder: what is known of its images, recorded, so that it is found once.

    FOLDER/.diffcore-scan.safetensors        names, sizes, times, pixel sizes, modes, hashes

Where the folder cannot be written, the record is in the cache of the user, `$XDG_CACHE_HOME` or
`~/.cache`, below `diffcore/scans/`. A later scan lists the folder and inspects only images that are
new, whose size, time of the last change or place (of a link) differs, or that could not be read. A
file that changes without a change of size and time is not noticed, unless `verify` is set.
"""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffcore.io.files import CorruptFileError, hash_file, remove_leftovers
from diffcore.io.images.inspection import PARALLEL, ImageFacts, inspect_images
from diffcore.io.lock import wait_for_lock
from diffcore.io.safetensors import read_weights_and_metadata, write_weights
from diffcore.training.data.listing import FileList, PackedTexts, list_files, printable

__all__ = ["SUFFIXES", "FolderScan", "record_path", "scan_folder", "shared_scans"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NAME = ".diffcore-scan.safetensors"
VERSION = 2
"""Number of the rule by which images are inspected: a record of another one is made again."""
DIGEST = 32
CLOCK_TICK_NS = 2 * 10**9
"""Longest time within which the clock of a file system may stand still, that of FAT."""
COLUMNS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "width": (torch.int32, ()),
    "height": (torch.int32, ()),
    "mode": (torch.uint8, ()),
    "is_grey": (torch.bool, ()),
    "is_black": (torch.bool, ()),
    "sha256": (torch.uint8, (DIGEST,)),
}
_shared: ContextVar[dict[tuple[str, bool], "FolderScan"] | None] = ContextVar("scans", default=None)
LISTED = {"bytes": torch.int64, "mtime_ns": torch.int64, "link": torch.int64}


@dataclass(frozen=True, eq=False)
class FolderScan:
    """What is known of the image files of a folder, sorted by name.

    Args:
        files: names, sizes and times of the files.
        width: (N,) columns of the upright image; 0 where it cannot be read.
        height: (N,) rows of the upright image; 0 where it cannot be read.
        mode: (N,) index into `modes`.
        is_grey: (N,) True for grey values.
        is_black: (N,) True for an image of black pixels alone.
        sha256: (N, 32) hash of each file.
        modes: modes of Pillow that occur, such as RGB; "" where an image cannot be read.
        reasons: index of each unreadable image -> why it cannot be read.
    """

    files: FileList
    width: Tensor
    height: Tensor
    mode: Tensor
    is_grey: Tensor
    is_black: Tensor
    sha256: Tensor
    modes: list[str]
    reasons: dict[int, str]

    def __len__(self) -> int:
        return len(self.files.names)

    @property
    def readable(self) -> Tensor:
        """(M,) index of each image that can be read, in order."""
        return self.width.nonzero().flatten()


def scan_folder(folder: str | Path, verify: bool = False) -> FolderScan:
    """Scan the images of a folder and its sub-folders, or read the record of an earlier scan.

    Of several ranks that call it, one inspects the images; the others wait and read the record.

    Args:
        folder: folder that is searched for images.
        verify: True reads every file and compares its hash with the record.

    Returns:
        The scan; it may be empty.

    Raises:
        ValueError: It is not a folder, or a link in it leads to a folder that contains the link.
    """
    known = _shared.get()
    key = (os.path.realpath(folder), verify)
    if known is None or key not in known:
        scan = _scan_folder(Path(folder), verify)
        return scan if known is None else known.setdefault(key, scan)
    return known[key]


@contextmanager
def shared_scans() -> Iterator[None]:
    """Inside, a folder is listed and scanned once, however many data sets read it.

    It holds for the start of a run, during which a folder does not change.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def _scan_folder(folder: Path, verify: bool) -> FolderScan:
    start = time.time_ns()
    files = list_files(folder, SUFFIXES)
    recorded = _read_record(folder)
    scan, is_known = _combine(files, recorded)
    if verify:
        is_known &= _has_recorded_hash(folder, scan, is_known)
    if bool(is_known.all()):
        return scan
    path = record_path(folder)
    with suppress(OSError):  # then the scan cannot be recorded, which is reported below
        path.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(path.with_suffix(".lock"), f"the scan of {printable(folder)}"):
        if not verify and (latest := _read_record(folder)) is not recorded:
            recorded = latest  # another rank may have scanned meanwhile
            scan, is_known = _combine(files, recorded)
        _inspect_and_record(folder, scan, is_known, recorded, start)
    return scan


def record_path(folder: str | Path, name: str = NAME) -> Path:
    """The file in which something is recorded about the files of a folder.

    Args:
        folder: folder of the files.
        name: name of the record; by default that of the scan of images.

    Returns:
        A hidden file of the folder; if it cannot be written, a file in the cache of the user.
    """
    if os.access(folder, os.W_OK):
        return Path(folder) / name
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    key = sha256(os.fsencode(os.path.join(os.path.realpath(folder), name))).hexdigest()[:DIGEST]
    return caches / "diffcore" / "scans" / f"{key}.safetensors"


def _inspect_and_record(
    folder: Path, scan: FolderScan, is_known: Tensor, recorded: FolderScan | None, start: int
) -> None:
    """Inspect the images that are not known, and record the scan, also of an interrupted one."""
    rows = (~is_known).nonzero().flatten().tolist()
    path, names = record_path(folder), scan.files.names
    try:
        for index, facts in inspect_images([f"{folder}/{names[row]}" for row in rows]):
            _fill(scan, rows[index], facts)
    finally:
        recordable = _without_recent_times(scan, start)
        is_new = recorded is None or not _is_equal(recordable, recorded)
        if is_new and len(scan.readable):  # a refused folder is left as it was
            _write(path, recordable)
    if len(rows) >= PARALLEL:
        _message(f"{len(rows):,} images of {printable(folder)} were scanned; see {printable(path)}")


def _fill(scan: FolderScan, row: int, facts: ImageFacts) -> None:
    """Enter the facts of an image, in arrays that share the memory of the tensors."""
    if facts.mode not in scan.modes:
        scan.modes.append(facts.mode)
    values = {**facts._asdict(), "mode": scan.modes.index(facts.mode)}
    values["sha256"] = np.frombuffer(bytes.fromhex(facts.sha256) or bytes(DIGEST), np.uint8)
    for name in COLUMNS:
        getattr(scan, name).numpy()[row] = values[name]
    scan.reasons.pop(row, None)
    if facts.reason:
        scan.reasons[row] = facts.reason


def _combine(files: FileList, recorded: FolderScan | None) -> tuple[FolderScan, Tensor]:
    """The scan of listed files as far as the record knows it, and (N,) which of them it knows."""
    size = len(files.names)
    if not recorded:  # it is missing, or empty
        empty = {
            name: torch.zeros(size, *shape, dtype=dtype) for name, (dtype, shape) in COLUMNS.items()
        }
        return _scan(files, empty), torch.zeros(size, dtype=torch.bool)
    if files.names.equals(recorded.files.names):
        rows = torch.arange(size)
    else:
        lookup = {name: row for row, name in enumerate(recorded.files.names)}
        rows = torch.tensor([lookup.get(name, -1) for name in files.names], dtype=torch.int64)
    is_known = rows >= 0
    rows = rows.clamp(min=0)
    for name in LISTED:
        is_known &= getattr(files, name) == getattr(recorded.files, name)[rows]
    is_known &= recorded.width[rows] > 0  # an unreadable image may have become readable
    columns = {name: getattr(recorded, name)[rows] for name in COLUMNS}
    for column in columns.values():
        column[~is_known] = 0
    return _scan(files, columns, list(recorded.modes)), is_known


def _has_recorded_hash(folder: Path, scan: FolderScan, is_known: Tensor) -> Tensor:
    """(N,) False for each known image whose content has another hash than the record."""
    result = is_known.clone()
    names = scan.files.names
    for row in tqdm(is_known.nonzero().flatten().tolist(), desc="verifying images", delay=1):
        try:
            digest = hash_file(folder / names[row])
        except OSError:
            digest = ""
        result[row] = digest == scan.sha256[row].numpy().tobytes().hex()
    return result


def _without_recent_times(scan: FolderScan, start: int) -> FolderScan:
    """The scan without the times of files that changed a moment ago.

    The clock of a file system may tick only every few milliseconds, or every two seconds, so that
    such a file could change again without a change of its time. It is inspected again next time.
    """
    mtime = scan.files.mtime_ns
    is_recent = (mtime - start).abs() < CLOCK_TICK_NS
    files = replace(scan.files, mtime_ns=torch.where(is_recent, -2, mtime))
    return replace(scan, files=files)


def _is_equal(scan: FolderScan, other: FolderScan) -> bool:
    return (
        scan.files.names.equals(other.files.names)
        and all(torch.equal(getattr(scan.files, n), getattr(other.files, n)) for n in LISTED)
        and all(torch.equal(getattr(scan, name), getattr(other, name)) for name in COLUMNS)
        and (scan.modes, scan.reasons) == (other.modes, other.reasons)
    )


def _write(path: Path, scan: FolderScan) -> None:
    tensors = {name: getattr(scan, name) for name in COLUMNS}
    tensors |= {name: getattr(scan.files, name) for name in LISTED}
    texts = {
        "name": scan.files.names,
        "mode_names": PackedTexts.pack(scan.modes),
        "reason": PackedTexts.pack(scan.reasons.values()),
    }
    for name, packed in texts.items():
        tensors |= {f"{name}.data": packed.data, f"{name}.ends": packed.ends}
    tensors["unreadable"] = torch.tensor(list(scan.reasons), dtype=torch.int64)
    try:
        remove_leftovers(path.parent, re.escape(path.name))
        write_weights(path, tensors, version=VERSION)
    except OSError as error:
        _message(f"the scan cannot be recorded, and is made again next time: {error}")


def _read_record(folder: Path) -> FolderScan | None:
    """The recorded scan, or None; a file that is no record of a scan is reported and ignored."""
    path = record_path(folder)
    beside = folder / NAME
    if not path.exists() and beside.is_file():  # a folder that only its owner can write
        path = beside
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_weights_and_metadata(path)
        if metadata != {"version": VERSION}:
            return None
        return _checked_scan(tensors)
    except (CorruptFileError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        _message(
            f"{printable(path)} is no record of a scan ({error}): the images are scanned again"
        )
        return None


def _checked_scan(tensors: Mapping[str, Tensor]) -> FolderScan:
    """The scan of a record whose columns fit together; raises an error otherwise."""
    names, modes, reasons = (
        PackedTexts.checked(tensors[f"{name}.data"], tensors[f"{name}.ends"])
        for name in ("name", "mode_names", "reason")
    )
    for name, (dtype, shape) in (COLUMNS | {name: (t, ()) for name, t in LISTED.items()}).items():
        column = tensors[name]
        if column.dtype != dtype or column.shape != (len(names), *shape):
            raise ValueError(f"{name} is {column.dtype} of shape {tuple(column.shape)}")
    if len(names) and int(tensors["mode"].max()) >= len(modes):
        raise ValueError("a mode has no name")
    unreadable = tensors["unreadable"].tolist()
    files = FileList(names, *(tensors[name] for name in LISTED))
    return _scan(files, tensors, list(modes), dict(zip(unreadable, reasons, strict=True)))


def _scan(
    files: FileList,
    columns: Mapping[str, Tensor],
    modes: list[str] | None = None,
    reasons: dict[int, str] | None = None,
) -> FolderScan:
    fields: dict[str, Any] = {name: columns[name] for name in COLUMNS}
    return FolderScan(files, **fields, modes=modes or [""], reasons=reasons or {})


def _message(text: str) -> None:
    print(f"diffcore: {text}", file=sys.stderr)
