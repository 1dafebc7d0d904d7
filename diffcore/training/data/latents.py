"""A data set of VAE latents with captions as labels; latents and text embeddings are cached.

z = mean + std ξ,   ξ ~ N(0, I), drawn anew at each visit of an image
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffcore.core.random import Stream, normal
from diffcore.training.data.cache import Cache, hash_content
from diffcore.training.data.captions import read_captions
from diffcore.training.data.image_files import Fit, ImageFiles, Unreadable
from diffcore.training.data.image_folder import label_images
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import DataSource

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.prompts import Prompts
    from diffcore.integrations.diffusers.loading.vae import Latents

__all__ = ["LatentDataset"]

NULL = "\0"
"""Text whose key is that of the null condition.

The null condition is the empty prompt. Some pipelines encode it otherwise than an empty caption.
"""

LARGE_BANK = 2**30
"""Number of bytes above which the text embeddings stay on the host."""

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
            metadata.jsonl, metadata.csv, or a .txt file beside each image.
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

    Raises:
        ValueError: There are no images, some cannot be read, only some have a caption, one has
            several, or the pipeline has no VAE.
    """

    labels: Tensor

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
    ) -> None:
        from diffcore.integrations.diffusers.loading.index import PipelineIndex

        self.pipeline, self.flip = PipelineIndex(Path(pipeline)), flip
        size = size or self.pipeline.image_size
        self.images = ImageFiles(Path(folder), size, "RGB", fit, unreadable, verify)
        texts = read_captions(Path(folder), self.images.names) if captions else []
        self.texts = tuple(sorted(set(texts)))
        if texts:
            indices = {text: index for index, text in enumerate(self.texts)}
            self.labels = torch.tensor([indices[text] for text in texts])
        else:
            self.class_names, self.labels = label_images(self.images)
        pixels = str(size)
        self.latent_keys = [
            hash_content(bytes(content).hex(), fit, pixels, DECODING)
            for content in self.images.hashes.numpy()
        ]
        self.text_keys = (
            [hash_content(text, pixels) for text in (*self.texts, NULL)] if texts else []
        )
        self.latents = Cache(Path(cache) / "latents" / hash_content(*self.pipeline.paths("vae")))
        self.embeddings = Cache(Path(cache) / "embeddings" / self._text_encoder_hash())

    def __len__(self) -> int:
        return len(self.latent_keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The mean of the latents, and the label."""
        return self.latents.read(self.latent_keys[index])["mean"], int(self.labels[index])

    is_latent = True

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The latents drawn at a position of the run, and the label.

        Args:
            index: index of the image.
            seed: seed of the run.
            position: number of samples of the run before this one.

        Returns:
            z (*shape) and the label.
        """
        key = self.latent_keys[index]
        if self.flip and is_mirrored(seed, position):
            key = _mirrored(key)
        entry = self.latents.read(key)
        mean, std = entry["mean"], entry["std"]
        z = mean + std * normal(seed, Stream.LATENT, position, mean.shape)[0]
        return z, int(self.labels[index])

    @property
    def content_hash(self) -> str:
        """Hash of everything that the items and the text embeddings are computed from."""
        encoders = (
            self.latents.folder.name,
            self.embeddings.folder.name if self.text_keys else "",
        )
        return hash_content(
            *encoders, *self.latent_keys, *map(str, self.labels.tolist()), *self.text_keys
        )

    def prompts(self) -> "Prompts":
        """Read the text embeddings.

        Returns:
            The bank that a label is an index into; its last row is the null condition.
        """
        from diffcore.integrations.diffusers.loading.prompts import Prompts

        rows = [self.embeddings.read(key) for key in self.text_keys]
        return Prompts(
            {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, self.texts
        )

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a text-conditional network so that it accepts labels.

        Args:
            device: device of the network; text embeddings are copied to it unless they are large.

        Returns:
            The function; the identity without captions.
        """
        from diffcore.integrations.diffusers.loading.prompts import PromptNetwork

        if not self.texts:
            return lambda network: network
        bank = self.prompts()
        is_small = sum(value.nbytes for value in bank.tensors.values()) < LARGE_BANK
        return partial(
            PromptNetwork,
            prompts=bank.map(lambda value: value.to(device)) if is_small else bank,
            move_prompts=False,
        )

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
        return not (self.latents.missing(self._images()) or self.embeddings.missing(self.text_keys))

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
            self._encode_texts(device)
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
            self.embeddings.rescan()

    def _images(self) -> dict[str, tuple[int, bool]]:
        """Key of the latents -> index of the image, and whether it is mirrored."""
        keys = {key: (index, False) for index, key in enumerate(self.latent_keys)}
        mirrored = {_mirrored(key): (index, True) for key, (index, _) in keys.items()}
        return keys | mirrored if self.flip else keys

    @torch.no_grad()
    def _encode_images(self, device: torch.device) -> None:
        images = self._images()
        if missing := self.latents.missing(images):
            vae = self._vae(device)

            def entries(keys: Sequence[str]) -> Entries:
                for index, mirror in (images[key] for key in keys):
                    image = self.images[index].to(device)[None]
                    mean, std = vae.posterior(image.flip(-1) if mirror else image)
                    yield {"mean": mean[0], "std": std[0]}

            self.latents.compute(missing, entries, "latents")

    def _encode_texts(self, device: torch.device) -> None:
        from diffcore.integrations.diffusers import encode_prompts

        if missing := self.embeddings.missing(self.text_keys):
            pipeline = self.pipeline.read_text_pipeline().to(device)
            texts = dict(zip(self.text_keys, self.texts, strict=False))  # without the null key
            size = (self.images.size, self.images.size)

            def entries(keys: Sequence[str]) -> Entries:
                captions = [texts[key] for key in keys if key in texts]
                # The bank ends with the null condition, and the null key is the last of all keys.
                bank = encode_prompts(pipeline, captions, size=size)
                for row in range(len(keys)):
                    yield {name: value[row] for name, value in bank.tensors.items()}

            self.embeddings.compute(missing, entries, "captions")

    def _text_encoder_hash(self) -> str:
        """Hash of everything besides the caption that its embeddings depend on."""
        paths = self.pipeline.paths("text_encoder", "tokenizer") if self.texts else []
        # The class of the pipeline and the config of the network select the inputs of the network.
        configs = (self.pipeline.content, self.pipeline.config(self.pipeline.network_name))
        return hash_content(*map(str, configs), *paths)

    def _vae(self, device: torch.device) -> "Latents":
        from diffcore.integrations.diffusers.loading.vae import Latents

        return Latents(self.vae.to(device))


def _mirrored(key: str) -> str:
    return hash_content(key, "mirrored")
