"""Features of a set of images, computed in chunks that are kept on disk."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.evaluation.features.extractor import FeatureExtractor
from diffcore.evaluation.features.image_set import ImageSet
from diffcore.evaluation.image_statistics import image_statistics
from diffcore.io.safetensors import read_weights, write_weights

__all__ = ["FeatureCache", "FeatureTable", "chunks"]

CHUNK = 256
"""Number of images whose features are computed together and written to one file."""


class FeatureTable(NamedTuple):
    """What is known of a set of images.

    Args:
        features: (N, d) float32 features.
        logits: (N, K) logits of a classifier; (N, 0) without one.
        statistics: (N, 4) result of `image_statistics`.
        labels: (N,) class labels; -1 without one.
        digest: SHA-256 of the images.
    """

    features: Tensor
    logits: Tensor
    statistics: Tensor
    labels: Tensor
    digest: str


class FeatureCache:
    """Computes features in chunks; a chunk is computed once for given images and extractor.

    The chunks of a set do not depend on what exists already, nor on the number of ranks, so that
    an interrupted computation gives the same bits.

    Args:
        extractor: feature extractor.
        folder: folder of the files; it is created.
    """

    def __init__(self, extractor: FeatureExtractor, folder: str | Path) -> None:
        self.extractor, self.folder = extractor, Path(folder)

    def fill(self, images: ImageSet, rank: int, ranks: int) -> None:
        """Compute this rank's share of the chunks that do not exist.

        Args:
            images: images.
            rank: number of this rank.
            ranks: number of ranks.
        """
        for rows in chunks(len(images))[rank::ranks]:
            self._chunk(images.read(rows))

    def table(self, images: ImageSet) -> FeatureTable:
        """The features of all images.

        Args:
            images: images.

        Returns:
            The table, in the order of the images.
        """
        parts, digest = [], hashlib.sha256()
        for rows in chunks(len(images)):
            content = images.read(rows)
            digest.update(content.numpy().tobytes())
            parts.append(self._chunk(content))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return FeatureTable(**columns, labels=images.labels, digest=digest.hexdigest())

    def _chunk(self, images: Tensor) -> dict[str, Tensor]:
        extractor = self.extractor
        key = hashlib.sha256(images.numpy().tobytes())
        facts = (extractor.name, extractor.digest, extractor.resizing, tuple(images.shape))
        key.update(repr(facts).encode())
        path = self.folder / f"{key.hexdigest()[:32]}.safetensors"
        if path.is_file():
            return read_weights(path)
        found = extractor(images)
        columns = {**found._asdict(), "statistics": image_statistics(images)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_weights(path, columns)
        return columns


def chunks(count: int) -> list[range]:
    """The rows of each chunk.

    Args:
        count: number of images.

    Returns:
        Ranges of at most `CHUNK` rows.
    """
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
