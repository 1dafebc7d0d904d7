"""Checks of image files and captions: unreadable files, modes, sizes, equal files, captions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffcore.doctor.data import find_repeats
from diffcore.doctor.findings import Finding
from diffcore.training.data.image_files import ImageFiles
from diffcore.training.data.listing import printable
from diffcore.training.data.scan import FolderScan

__all__ = ["check_captions", "check_files"]

LISTED = 3
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def check_files(images: ImageFiles, skips_unreadable: bool = False) -> list[Finding]:
    """Check the files of a folder of images by its recorded scan.

    Args:
        images: the images, those that cannot be read left out of `images.names`.
        skips_unreadable: whether the run skips images that cannot be read, in place of refusing.

    Returns:
        One finding for each check.
    """
    scan = images.scan
    return [
        _unreadable(scan, skips_unreadable),
        _modes(scan, images),
        _sizes(scan, images),
        _equal_files(images),
    ]


def _unreadable(scan: FolderScan, is_skipped: bool) -> Finding:
    names = scan.files.names
    failed = {names[row]: scan.reasons[row] for row in sorted(scan.reasons)}
    values = {"unreadable": failed, "found": len(scan)}
    if not failed:
        return Finding("unreadable files", "ok", f"all {len(scan)} images can be read.", values)
    listed = ", ".join(
        f"{printable(name)} ({reason})" for name, reason in list(failed.items())[:LISTED]
    )
    return Finding(
        "unreadable files",
        "warning" if is_skipped else "wrong",
        f"{len(failed)} of {len(scan)} images cannot be read, such as {listed}: repair or delete "
        f"them{'' if is_skipped else ', or set data.unreadable: skip'}.",
        values,
    )


def _modes(scan: FolderScan, images: ImageFiles) -> Finding:
    """Whether modes are mixed, so that the conversion changes some images."""
    rows = scan.readable
    total, grey = len(rows), int(scan.is_grey[rows].sum())
    counts = Counter(scan.modes[index] for index in scan.mode[rows].tolist())
    transparent = sum(counts[mode] for mode in TRANSPARENT)
    listed = ", ".join(f"{count} {mode}" for mode, count in counts.most_common())
    faults = []
    if images.channels == "RGB" and 0 < grey < total:
        faults.append(f"{grey} are grey among colour images, which the network learns as a style")
    if images.channels == "RGB" and grey == total:
        faults.append("all are grey: set data.channels: L and one channel in process and network")
    if images.channels == "L" and grey < total:
        faults.append(f"{total - grey} lose their colour, because data.channels is L")
    if transparent:
        faults.append(
            f"{transparent} are transparent, whose hidden pixels keep their stored colour: paint "
            "them onto a background first"
        )
    values = {"modes": dict(counts), "grey": grey}
    if faults:
        return Finding("channel modes", "warning", f"{listed}; {'; '.join(faults)}.", values)
    return Finding("channel modes", "ok", f"{listed}, read as {images.channels}.", values)


def _sizes(scan: FolderScan, images: ImageFiles) -> Finding:
    """The share of images that are scaled up, and so are blurred."""
    width, height = scan.width[scan.readable], scan.height[scan.readable]
    # `pad` scales the longer side to the size, and `crop` the shorter one.
    scaled = width.maximum(height) if images.fit == "pad" else width.minimum(height)
    small = int((scaled < images.size).sum())
    share = small / len(scaled)
    smallest, largest = int(width.minimum(height).min()), int(width.maximum(height).max())
    values = {"smallest": smallest, "largest": largest, "scaled up": share}
    text = (
        f"sides of {smallest} to {largest} pixels, read at {images.size}; {small} of {len(scaled)} "
        f"images ({share:.0%}) are scaled up"
    )
    if not small:
        return Finding("image sizes", "ok", f"{text}.", values)
    return Finding(
        "image sizes",
        "wrong" if share > 0.5 else "warning",
        f"{text}, which the network learns as blur: remove them, or set a smaller data.size.",
        values,
    )


def _equal_files(images: ImageFiles) -> Finding:
    """Files of equal bytes."""
    digests = (digest.tobytes() for digest in images.hashes.numpy())
    pairs = find_repeats(digests, images.names)
    values, count = {"pairs": pairs}, len(images)
    if not pairs:
        return Finding("equal files", "ok", f"all {count} files differ.", values)
    listed = "; ".join(f"{printable(a)} and {printable(b)}" for a, b in pairs[:LISTED])
    return Finding(
        "equal files",
        "wrong" if len(pairs) > count / 2 else "warning",
        f"{len(pairs)} of {count} files repeat another one, such as {listed}: remove them, because "
        "the network learns repeated images by heart.",
        values,
    )


def check_captions(
    texts: Sequence[str], labels: Sequence[int], tokenizers: dict[str, Any]
) -> Finding:
    """Check captions: empty ones, ones of many images, and ones that the text encoder cuts.

    Args:
        texts: distinct captions.
        labels: index of the caption of each image.
        tokenizers: tokenizers of the pipeline by their name.

    Returns:
        The finding.
    """
    counts = Counter(labels)
    empty = sum(counts[index] for index, text in enumerate(texts) if not text.strip())
    shared = len(labels) - len(counts)
    cut = {name: _cut_captions(texts, tokenizer) for name, tokenizer in tokenizers.items()}
    values = {"distinct": len(texts), "empty": empty, "shared": shared, "cut": cut}
    faults = []
    if empty:
        faults.append(f"{empty} are empty, which the network learns as the null condition")
    if shared > len(labels) / 2:
        faults.append(f"{shared} of {len(labels)} images have the caption of another image")
    faults += [
        f"{count} are longer than the {tokenizers[name].model_max_length} tokens of {name}, and "
        "their ends are cut"
        for name, count in cut.items()
        if count
    ]
    text = f"{len(texts)} distinct captions of {len(labels)} images"
    if faults:
        return Finding("captions", "warning", f"{text}; {'; '.join(faults)}.", values)
    return Finding("captions", "ok", f"{text}, none empty or too long.", values)


def _cut_captions(texts: Sequence[str], tokenizer: Any) -> int:
    """Number of captions with more tokens than the tokenizer keeps."""
    limit = tokenizer.model_max_length
    return sum(len(tokenizer(text, truncation=False).input_ids) > limit for text in texts)
