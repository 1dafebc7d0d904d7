"""Tar files that are read forwards, local ones or from a web server."""

import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from itertools import islice
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from diffcore.io.images.pixels import Fit
from diffcore.training.data.arrays.shards import find_shards
from diffcore.training.data.collections.images import ImageOptions
from diffcore.training.data.collections.streams import EncodedImage, Restart, StreamSource
from diffcore.training.data.collections.tar_members import (
    Fields,
    Sample,
    group_samples,
    read_members,
)
from diffcore.training.data.listing import printable

__all__ = ["TarStream"]

TIMEOUT = 60.0
"""Seconds after which a server that does not answer is tried again."""
ATTEMPTS = 5
"""Number of attempts to read on in a file after its connection was lost."""
WAIT = 1.0
"""Seconds before the second attempt; doubled for each further one."""


class TarStream(StreamSource):
    """Images in tar files (WebDataset shards) that are read forwards, also from a web server.

    Use `TarShards` for files on a disk that can be read at any position. A file may be compressed
    by gzip, bzip2 or xz. A lost connection is opened again, and what was read before is skipped.
    Addresses that would start a program (`pipe:`) do not exist here.

    Args:
        paths: .tar files: paths, patterns, or addresses that begin with https:// or http://.
        size: height and width of x_0 in pixels.
        channels: RGB or L; every image is converted to it.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        image: extension of the member that is the image; "" for the only one of a known format.
        label: extension of the member with the integer label, or json.NAME for an entry of the
            member json; "" for data without labels.
        window: number of samples that are shuffled among each other, and held in memory encoded,
            for each lane.
        lanes: number of sequences of files that are read side by side, at most the number of
            files. Each rank and worker reads only its own lanes if `lanes` is their number times
            the number of turns in a micro-batch.
        turn: number of consecutive samples that a lane supplies; the size of a micro-batch, or a
            divisor of it.
        restart: reread (a resumed run reads the files again up to its position, and continues
            exactly) or renew (it begins new epochs, so that samples of the interrupted epoch are
            repeated or left out).

    Raises:
        ValueError: A file does not exist, an address is of another kind, or a number is out of
            range.
    """

    def __init__(
        self,
        paths: list[str],
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        image: str = "",
        label: str = "cls",
        window: int = 1024,
        lanes: int = 1,
        turn: int = 16,
        restart: Restart = "reread",
    ) -> None:
        self.paths = [path for given in paths for path in _find(given)]
        if not self.paths:
            raise ValueError("paths is empty, expected at least one tar file")
        self.fields = Fields(image, label, "")
        options = ImageOptions(size, channels, fit, flip)
        super().__init__(options, len(self.paths), window, lanes, turn, restart)

    def _read_shard(self, shard: int) -> Iterator[EncodedImage]:
        path, done, attempt = self.paths[shard], 0, 0
        while True:
            try:
                for sample in islice(self._samples(path), done, None):
                    yield _encoded(sample, path)
                    done, attempt = done + 1, 0
                return
            except (OSError, HTTPException) as error:
                attempt += 1
                is_final = isinstance(error, HTTPError) and error.code < 500
                if attempt == ATTEMPTS or is_final or not is_address(path):
                    raise ValueError(f"{printable(path)} cannot be read: {error}") from None
                time.sleep(WAIT * 2 ** (attempt - 1))

    def _samples(self, path: str) -> Iterator[Sample[bytes]]:
        with closing(_open(path)) as file:
            try:
                members = read_members(file, True, _content)
                yield from group_samples(members, self.fields, bytes)
            except ValueError as error:
                raise ValueError(f"{printable(path)} is refused: {error}") from None

    def _identity(self) -> tuple[str, ...]:
        return (str(self.fields), *(path.rpartition("/")[2] for path in self.paths))


def is_address(path: str) -> bool:
    """Whether a path is an address of a web server.

    Args:
        path: path or address.

    Returns:
        True for http:// and https://.
    """
    return path.startswith(("https://", "http://"))


def _find(path: str) -> list[str]:
    if is_address(path):
        return [path]
    scheme = urlsplit(path).scheme
    if len(scheme) > 1:  # one letter is a drive
        raise ValueError(
            f"paths contains {path!a}, expected a path, or an address that begins with https:// or "
            "http://"
        )
    suffixes = (".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz")
    suffix = next((end for end in suffixes if path.endswith(end)), ".tar")
    return [str(file) for file in find_shards(path, "." + suffix.rpartition(".")[2])]


def _open(path: str) -> Any:
    if not is_address(path):
        return open(path, "rb")
    return _Response(urlopen(path, timeout=TIMEOUT))


class _Response:
    """The content of an address, of which http.client does not notice that it was cut off."""

    def __init__(self, response: Any) -> None:
        self.response, self.close = response, response.close
        length = response.headers.get("Content-Length")
        self.left = int(length) if length else 0

    def read(self, size: int) -> bytes:
        content: bytes = self.response.read(size)
        self.left -= len(content)
        if size and not content and self.left > 0:
            raise ConnectionError(f"the connection ended {self.left} bytes too early")
        return content


def _content(archive: Any, member: Any) -> bytes:
    content: bytes = archive.extractfile(member).read()
    return content


def _encoded(sample: Sample[bytes], path: str) -> EncodedImage:
    label = -1 if sample.label is None else sample.label
    name = f"{printable(sample.stem)} of {printable(path)}"
    return EncodedImage(sample.image, label, name)
