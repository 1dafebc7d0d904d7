"""Inspection of image files in parallel: size, mode and hash of each, or why it cannot be read.

Threads would not do: the decoding of small images holds Python's lock, and two threads take twice
the time of one. The interpreters that this module starts import neither torch nor the program of
the user, so that they start in a third of a second, and a script needs no `if __name__` guard.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import IO, NamedTuple

from PIL import Image, ImageChops
from tqdm import tqdm

from diffcore.io.images.reader import read_content, read_image

__all__ = ["ImageFacts", "inspect_image", "inspect_images", "serve"]

CHUNK = 64
"""Number of images that an interpreter inspects at a time."""
PARALLEL = 512
"""Number of images from which on several interpreters inspect them."""
MAXIMUM_WORKERS = 32
GREY_MODES = ("1", "L", "LA", "La")
SERVER = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from diffcore.io.images.inspection import serve; serve(sys.stdin, sys.stdout)"
)


class ImageFacts(NamedTuple):
    """What a scan records of an image file.

    Args:
        width: number of columns of the upright image; 0 if it cannot be read.
        height: number of rows of the upright image; 0 if it cannot be read.
        mode: mode of Pillow, such as RGB; "" if it cannot be read.
        is_grey: True if its mode holds grey values, or a palette of them.
        is_black: True if all of its pixels are black.
        sha256: hash of the file, 64 hexadecimal digits; "" if it cannot be read.
        reason: why it cannot be read; "" if it can.
    """

    width: int
    height: int
    mode: str
    is_grey: bool
    is_black: bool
    sha256: str
    reason: str = ""


def inspect_image(path: str) -> ImageFacts:
    """Decode an image file and describe it.

    Args:
        path: image file.

    Returns:
        Its facts, or the reason why it cannot be decoded to RGB.
    """
    try:
        content = read_content(path)
        image = read_image(content)
        colours = image.convert("RGB")
    except ValueError as error:
        return ImageFacts(0, 0, "", False, False, "", str(error))
    is_grey = image.mode in GREY_MODES or (image.mode == "P" and _has_grey_pixels(colours))
    is_black, digest = colours.getbbox() is None, hashlib.sha256(content).hexdigest()
    return ImageFacts(*image.size, image.mode, is_grey, is_black, digest)


def inspect_images(paths: Sequence[str]) -> Iterator[tuple[int, ImageFacts]]:
    """Inspect image files, many of them on all processors, with a progress bar.

    Args:
        paths: image files.

    Yields:
        The index of each file in `paths` and its facts, in the order in which they are known.

    Raises:
        ValueError: An interpreter that decodes images crashed.
    """
    workers = min(_processors(), len(paths) // (PARALLEL // 2), MAXIMUM_WORKERS)
    chunks = [range(first, min(first + CHUNK, len(paths))) for first in range(0, len(paths), CHUNK)]
    with tqdm(total=len(paths), desc="scanning images", delay=1, mininterval=0.5) as bar:
        for chunk, facts in (_serial if workers < 2 else _Interpreters(workers))(paths, chunks):
            yield from zip(chunk, facts, strict=True)
            bar.update(len(chunk))


def serve(requests: Iterable[str], answers: IO[str]) -> None:
    """Inspect the images that lines of JSON name, and answer each line by one of JSON.

    Args:
        requests: lines, each a list of paths.
        answers: stream that receives as many lines, each a list of the fields of `ImageFacts`.
    """
    for line in requests:
        print(json.dumps([inspect_image(path) for path in json.loads(line)]), file=answers)
        answers.flush()


def _serial(
    paths: Sequence[str], chunks: Sequence[range]
) -> Iterator[tuple[range, list[ImageFacts]]]:
    for chunk in chunks:
        yield chunk, [inspect_image(paths[index]) for index in chunk]


class _Interpreters:
    """Interpreters that inspect chunks of images; a thread for each waits for its answers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self, paths: Sequence[str], chunks: Sequence[range]
    ) -> Iterator[tuple[range, list[ImageFacts]]]:
        waiting: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()

        def inspect(chunk: range) -> tuple[range, list[ImageFacts]]:
            server = waiting.get()
            try:
                return chunk, _request(server, [paths[index] for index in chunk])
            finally:
                waiting.put(server)

        with ExitStack() as stack:
            for _ in range(self.count):
                server = _start_server()
                stack.callback(_stop_server, server)
                waiting.put(server)
            pool = stack.enter_context(ThreadPoolExecutor(self.count))
            stack.callback(pool.shutdown, cancel_futures=True)
            yield from pool.map(inspect, chunks)


def _start_server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVER, json.dumps(sys.path)]
    # ASCII: json escapes the rest, also bytes of names that are not UTF-8.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        start_new_session=True,  # Ctrl-C reaches this interpreter alone, which ends the others
    )


def _stop_server(server: "subprocess.Popen[str]") -> None:
    server.kill()
    server.communicate()


def _request(server: "subprocess.Popen[str]", paths: list[str]) -> list[ImageFacts]:
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(json.dumps(paths) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise ValueError(
            f"the decoder of images ended with status {server.wait()} at one of the files from "
            f"{paths[0]!a} to {paths[-1]!a}: remove the damaged one, or make memory free"
        )
    return [ImageFacts(*fields) for fields in json.loads(answer)]


def _processors() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_grey_pixels(image: Image.Image) -> bool:
    """Whether red, green and blue are equal in every pixel of an RGB image."""
    red, green, blue = image.split()
    return all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
