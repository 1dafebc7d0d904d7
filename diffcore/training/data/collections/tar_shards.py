"""Tar files of images, in the convention of WebDataset, as a data set whose items have an order."""

from typing import Literal

import torch

from diffcore.io.images.pixels import Fit
from diffcore.training.data.arrays.shards import ShardedRows, find_shards, hash_shards
from diffcore.training.data.cache import hash_content
from diffcore.training.data.collections.images import (
    ImageCollection,
    ImageOptions,
    as_classes,
    check_condition,
)
from diffcore.training.data.collections.tar_index import index_tar, read_bytes
from diffcore.training.data.collections.tar_members import Fields
from diffcore.training.data.listing import printable

__all__ = ["TarShards"]


class TarShards(ImageCollection):
    """Images in tar files (WebDataset shards) that are read where they lie.

    Members of one stem are a sample: 0001.jpg with the label 0001.cls and the caption 0001.txt.
    Each file is read through once, and the positions of its images are recorded beside it. An
    image is then read by its position, so that samples come in the order of every other data set:
    a keyed permutation in each epoch, continued exactly after a restart.

    Args:
        path: .tar file; a folder or a glob pattern (`data/train-*.tar`) names several files, which
            are joined in the order of their names.
        size: height and width of x_0 in pixels.
        channels: RGB or L; every image is converted to it.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run.
        image: extension of the member that is the image, such as jpg or input.png; "" for the
            only one of a known format.
        label: extension of the member with the integer label, or json.NAME for an entry of the
            member json; "" for data without labels.
        caption: extension of the member with the caption, or json.NAME; the labels are then
            indices into the distinct captions. "" for none.

    Raises:
        ValueError: A file is damaged, truncated, compressed or hostile; a sample has no image or
            lacks its label or caption; or both label and caption are set.
    """

    def __init__(
        self,
        path: str,
        size: int,
        channels: Literal["RGB", "L"] = "RGB",
        fit: Fit = "crop",
        flip: bool = False,
        image: str = "",
        label: str = "cls",
        caption: str = "",
    ) -> None:
        options = ImageOptions(size, channels, fit, flip)
        check_condition(label, caption)
        self.fields, paths = Fields(image, label, caption), find_shards(path, ".tar")
        indices = [index_tar(file, self.fields) for file in paths]
        self.rows = ShardedRows(paths, [len(index.stems) for index in indices])
        self.indices = dict(zip(self.rows.paths, indices, strict=True))
        texts: tuple[str, ...] = ()
        labels = torch.cat([index.label for index in indices])
        if caption:
            texts, labels = as_classes([text for index in indices for text in index.captions])
        super().__init__(options, labels, None if label or caption else (), texts)

    def _read(self, index: int) -> tuple[bytes, str]:
        path, row = self.rows.locate(index)
        shard = self.indices[path]
        name = f"{printable(shard.stems[row])} of {printable(path)}"
        return read_bytes(path, int(shard.offset[row]), int(shard.bytes[row])), name

    @property
    def content_hash(self) -> str:
        """Hash of the options, the labels, and a part of each file, see `hash_shards`."""
        fields = f"{self.fields} {self.labels.tolist()}"
        return hash_content(str(self.options), fields, *self.texts, hash_shards(self.rows.paths))
