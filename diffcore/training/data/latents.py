"""A data set of VAE latents with captions as labels; latents and text embeddings are cached.

z = mean + std ξ,   ξ ~ N(0, I), drawn anew at each visit of an image
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from diffcore.core.random import Stream, normal, uniform
from diffcore.io.images.crop import Crop
from diffcore.training.data.buckets.groups import Groups
from diffcore.training.data.buckets.items import ImageItems, Visit
from diffcore.training.data.buckets.sizes import Buckets
from diffcore.training.data.cache import Cache, Precision, hash_content
from diffcore.training.data.captions import CaptionChoices, CaptionVariants, read_captions
from diffcore.training.data.captions.encodings import (
    CachedEmbeddings,
    CaptionEncoding,
    CaptionEncodings,
    NetworkTokens,
    text_encoder_hash,
)
from diffcore.training.data.conditioned.image_pairs import ConditionFolder, ImagePairs
from diffcore.training.data.image_files import Fit, ImageFiles, Unreadable
from diffcore.training.data.image_folder import label_images
from diffcore.training.data.masks import MaskFiles
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import SIZES, WEIGHT, DataSource

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.prompts import Prompts
    from diffcore.integrations.diffusers.loading.vae import Latents

__all__ = ["LatentDataset"]

DECODING = "upright"
"""Rule by which image files are decoded, a part of the key of their latents."""

POLL_SECONDS = 2.0
"""Time between two looks for the entries that the first rank has written."""

WAIT_SECONDS = 120.0
"""Time after which entries that a shared disk does not show are an error."""

Entries = Iterator[dict[str, Tensor]]


class LatentDataset(DataSource):
    """The latents of the images in a folder, with a caption or a sub-folder as the label of each.

    A label is an index into `texts`, the distinct captions, or without captions the index of a
    sub-folder like that of `ImageFolder`. Latents are cached by the content of the image, its size
    and fit, and the config and weights of the VAE; text embeddings by the caption and the files of
    the text encoders. Only missing entries are computed, each alone, and by the first rank;
    encoders are loaded only then.

    Args:
        folder: folder of the images, read like `ImageFolder` reads it; captions are in
            metadata.jsonl, metadata.csv, metadata.parquet, or a .txt or .json file beside each.
        pipeline: folder of the diffusers pipeline whose VAE and text encoders encode.
        size: height and width of the images in pixels; 0 for the size that the network of the
            pipeline was made for.
        fit: crop (scale the shorter side, crop the centre), pad (scale the longer side, fill with
            black) or exact (refuse an image of another size).
        flip: true mirrors half of the images, keyed by the position in the run; both are encoded.
        captions: false ignores captions, so that the sub-folders are the labels.
        unreadable: refuse images that cannot be read, or skip them.
        cache: folder for latents and text embeddings, on a disk that all ranks share.
        verify: true reads every file at the start, and compares its hash with the recorded scan;
            false compares size and time.
        buckets: sizes of several aspect ratios, each image at the one closest to its own; every
            batch is of one size. `size` is then that of previews. None: squares of `size`.
        crops: number of crops of each image that are encoded, evenly spread along the side that is
            cut; which one is read is keyed by the position in the run. 1: the centre.
        variants: templates, shuffled and dropped tags. An image with several captions or variants
            is read with one of them, keyed by the position in the run; None: the captions alone.
        masks: masks of the images, see `ImageFolder`, averaged over the area of each latent pixel.
        conditions: images of each condition, see `ImageFolder`; in pixels, not encoded.
        dtype: data type in which latents and text embeddings are cached, a part of the key of
            their folder; they are read as float32.
        text: embeddings (captions are encoded once, and cached) or tokens (captions are tokenised,
            for a network that trains its text encoders, which encode them in every step).

    Raises:
        ValueError: There are no images, some cannot be read, only some have a caption, or the
            pipeline has no VAE, or none that encodes the captions.
    """

    labels: Tensor
    is_latent = True

    def __init__(
        self,
        folder: str,
        pipeline: str,
        size: int = 0,
        fit: Fit = "crop",
        flip: bool = False,
        captions: bool = True,
        unreadable: Unreadable = "refuse",
        cache: str = "cache",
        verify: bool = False,
        buckets: Buckets | None = None,
        crops: int = 1,
        variants: CaptionVariants | None = None,
        masks: str = "",
        conditions: dict[str, ConditionFolder] | None = None,
        dtype: Precision = "float32",
        text: CaptionEncodings = "embeddings",
    ) -> None:
        from diffcore.integrations.diffusers.loading.index import PipelineIndex

        if text not in get_args(CaptionEncodings):
            raise ValueError(f"text is {text!r}, expected embeddings or tokens")
        if crops < 1 or (crops > 1 and fit != "crop"):
            raise ValueError(f"crops is {crops}, expected 1, or more with fit: crop")
        self.pipeline, self.flip, self.crops = PipelineIndex(Path(pipeline)), flip, crops
        size = size or self.pipeline.image_size
        self.images = ImageFiles(Path(folder), size, "RGB", fit, unreadable, verify)
        self.items = ImageItems(self.images, buckets)
        self.groups = self._groups()
        self.masks = MaskFiles(self.images, masks, verify) if masks else None
        self.has_masks = self.masks is not None
        self.conditions = ImagePairs(self.images, conditions or {}, verify)
        captions_of = read_captions(Path(folder), self.images.names) if captions else []
        texts = [(variants or CaptionVariants()).texts(own, i) for i, own in enumerate(captions_of)]
        self.texts = tuple(sorted({text for own in texts for text in own}))
        if texts:
            self.pipeline.check_encodes_text()
            indices = {text: index for index, text in enumerate(self.texts)}
            self.choices = CaptionChoices.of(texts, indices)
            labels = self.choices.first
        else:
            self.class_names, labels = label_images(self.images)
            self.choices = CaptionChoices(labels, torch.arange(1, len(labels) + 1))
        self.labels = labels[self.items.image]
        if texts and (buckets is not None or crops > 1) and self.pipeline.size_arguments:
            self.inputs = {SIZES: (6,)}
        stored = [] if dtype == "float32" else [dtype]
        vae = hash_content(*self.pipeline.paths("vae"), *stored)
        self.latents = Cache(Path(cache) / "latents" / vae, dtype)
        encoders = text_encoder_hash(self.pipeline, bool(texts), dtype)
        self.embeddings = Cache(Path(cache) / "embeddings" / encoders, dtype)
        self.encoding: CaptionEncoding
        if text == "tokens":
            self.encoding = NetworkTokens(self.pipeline, size)
        else:
            has_sizes = bool(self.inputs)
            self.encoding = CachedEmbeddings(self.pipeline, size, self.embeddings, has_sizes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        """The mean of the latents of the middle crop, the label and the extras."""
        visit = Visit(index, self.crops // 2)
        mean = self.latents.read(self._visit_key(visit))["mean"]
        return mean, int(self.labels[index]), self._extras(visit)

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        """The latents drawn at a position of the run, the label and the extras.

        Args:
            index: index of the item.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            z (C, h, w), the label, and the extras: conditions, and `sizes` (6,), see `Crop.sizes`.
        """
        crop = 0
        if self.crops > 1:
            crop = int(float(uniform(seed, Stream.CROP, position)) * self.crops)
        visit = Visit(index, crop, self.flip and is_mirrored(seed, position))
        entry = self.latents.read(self._visit_key(visit))
        mean, std = entry["mean"], entry["std"]
        z = mean + std * normal(seed, Stream.LATENT, position, mean.shape)[0]
        return z, self._label(index, seed, position), self._extras(visit)

    def _label(self, index: int, seed: int, position: int) -> int:
        """The label of one of the texts of an item, each as often as the others."""
        choices = self.choices[int(self.items.image[index])]
        if len(choices) == 1:
            return int(choices[0])
        return int(choices[int(float(uniform(seed, Stream.CAPTION, position)) * len(choices))])

    def _extras(self, visit: Visit) -> dict[str, Tensor]:
        crop = self._crop(visit)
        # A padded image has the sizes with which the network is sampled by default.
        whole = crop if self.images.fit == "crop" else Crop(crop.target, crop.target)
        extras = {SIZES: whole.sizes}
        image = int(self.items.image[visit.item])
        extras |= self.conditions.read(image, crop)
        if self.masks is not None:
            extras[WEIGHT] = self.masks.read(image, crop, self._factor)
        return extras

    @cached_property
    def _factor(self) -> int:
        """Number of pixels on the side of a latent pixel."""
        from diffcore.integrations.diffusers.loading.vae import downsampling_factor

        return downsampling_factor(self.pipeline.config("vae"))

    def _crop(self, visit: Visit) -> Crop:
        offset = (visit.crop + 0.5) / self.crops
        return self.items.crop(visit.item, offset, visit.is_mirrored)

    def latent_key(self, index: int) -> str:
        """Key of the latents of an item, whatever its crop: computed, not stored for each item."""
        content = bytes(self.images.hashes[self.items.image[index]].numpy()).hex()
        width, height = self.items.size(index)
        pixels = str(width) if width == height else f"{width} x {height}"
        return hash_content(content, self.images.fit, pixels, DECODING)

    def _visit_key(self, visit: Visit) -> str:
        """Key of the latents of one crop of an item."""
        key = self.latent_key(visit.item)
        if self.crops > 1:
            key = hash_content(key, f"crop {visit.crop} of {self.crops}")
        return hash_content(key, "mirrored") if visit.is_mirrored else key

    def _groups(self) -> Groups | None:
        if not self.items.has_buckets:
            return None
        return self.items.groups(int(self.pipeline.config("vae")["latent_channels"]), self._factor)

    @property
    def _encoders(self) -> tuple[str, str]:
        return self.latents.folder.name, self.embeddings.folder.name if self.texts else ""

    @property
    def encoder_hash(self) -> str:
        """Hash of the VAE, and with captions of the text encoders."""
        return hash_content(*self._encoders)

    @property
    def content_hash(self) -> str:
        """Hash of everything that the items and the text embeddings are computed from."""
        further = [f"{self.crops} crops"] if self.crops > 1 else []
        if not self.choices.is_single:
            further += [str(self.choices[image].tolist()) for image in self.items.image.tolist()]
        further += sorted(self.inputs)
        further += [part.content_hash for part in (self.groups, self.masks) if part is not None]
        further += filter(None, [self.conditions.content_hash])
        return hash_content(
            *self._encoders,
            *map(self.latent_key, range(len(self))),
            *map(str, self.labels.tolist()),
            *self.text_keys,
            *further,
        )

    @property
    def text_keys(self) -> list[str]:
        """Keys of the embeddings of the captions and of the null condition; [] without captions."""
        return self.encoding.keys(self.texts) if self.texts else []

    def prompts(self) -> "Prompts | None":
        """Read the text embeddings.

        Returns:
            The bank that a label is an index into; its last row is the null condition. None without
            captions, or if `text` is tokens, which the network encodes.
        """
        return self.encoding.bank(self.texts) if self.texts else None

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a text-conditional network so that it accepts labels.

        Args:
            device: device of the network; text embeddings are copied to it unless they are large.

        Returns:
            The function; the identity without captions.
        """
        if not self.texts:
            return lambda network: network
        return self.encoding.wrapper(self.texts, "", device)

    def prompt_wrapper(
        self, prompts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a network so that its labels are prompts, which are encoded once.

        Args:
            prompts: K texts; prompt k is label k, and K the null label.
            negative: text of the null condition; "": the empty prompt.
            device: device of the text encoders and of the network.

        Returns:
            The function.

        Raises:
            ValueError: The data has no captions.
        """
        if not self.texts:
            return super().prompt_wrapper(prompts, negative, device)
        self.encoding.prepare(prompts, negative, device)
        return self.encoding.wrapper(prompts, negative, device)

    @property
    def vae(self) -> nn.Module:
        """Decoder of the latents, which a run writes into its pipeline."""
        return self.pipeline.read("vae")

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] of latents (N, C, h, w)."""
        vae = self._vae(x.device)
        return torch.cat([vae.decode(one) for one in x.split(1)])

    @property
    def is_ready(self) -> bool:
        """True if every entry is cached."""
        has_texts = not self.texts or self.encoding.is_ready(self.texts)
        return has_texts and not self.latents.missing(self._visits())

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        """Compute the missing entries on one rank; the others then wait until they see them.

        Args:
            device: device on which the encoders run.
            is_main_process: True on the rank that computes.

        Raises:
            ValueError: The entries that the first rank has written do not appear.
        """
        if is_main_process:
            self._encode_images(device)
            if self.texts:
                self.encoding.prepare(self.texts, "", device)
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.is_ready:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the entries that the first rank wrote do not appear in the cache "
                    f"{self.latents.folder.parent.parent}: set data.cache to a folder on a disk "
                    "that all ranks share"
                )
            time.sleep(POLL_SECONDS)
            self.latents.rescan()
            self.encoding.rescan()

    def _visits(self) -> dict[str, Visit]:
        """Key of the latents -> the crop of an item that is encoded."""
        visits = (
            Visit(index, crop, is_mirrored)
            for is_mirrored in ((False, True) if self.flip else (False,))
            for index in range(len(self))
            for crop in range(self.crops)
        )
        return {self._visit_key(visit): visit for visit in visits}

    @torch.no_grad()
    def _encode_images(self, device: torch.device) -> None:
        visits = self._visits()
        if missing := self.latents.missing(visits):
            vae = self._vae(device)

            def entries(keys: Sequence[str]) -> Entries:
                for visit in (visits[key] for key in keys):
                    image = self.items.read(visit.item, self._crop(visit)).to(device)[None]
                    mean, std = vae.posterior(image)
                    yield {"mean": mean[0], "std": std[0]}

            self.latents.compute(missing, entries, "latents")

    def _vae(self, device: torch.device) -> "Latents":
        from diffcore.integrations.diffusers.loading.vae import Latents

        return Latents(self.vae.to(device))
