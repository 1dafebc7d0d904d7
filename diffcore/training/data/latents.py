"""Images encoded by a diffusers VAE, and their captions encoded by the text encoders: once, for
every later run.

z = mean + std ξ,   ξ ~ N(0, I), drawn anew at each position of the run
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffcore.core.random import Stream, normal
from diffcore.io.files import hash_file
from diffcore.training.data.cache import Cache, digest
from diffcore.training.data.captions import read_captions
from diffcore.training.data.image_folder import Fit, ImageFolder, Unreadable
from diffcore.training.data.order import is_mirrored
from diffcore.training.data.source import DataSource

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.prompts import Prompts
    from diffcore.integrations.diffusers.loading.vae import Latents

__all__ = ["LatentDataset"]

NULL = "\0"
"""Key of the null condition: some pipelines encode the empty prompt in another way than a caption.
"""

LARGE = 2**30
"""Size in bytes from which the embeddings stay on the host; each call of the network then copies
its rows.
"""

POLL_SECONDS = 2.0
"""Seconds between two checks of what the first rank has encoded."""

Entries = Iterator[dict[str, Tensor]]


class LatentDataset(DataSource):
    """The latents of a folder of images, labelled by caption, or by sub-folder without captions.

    A label is an index into `texts`. Latents are cached under the content of the image, its size
    and fit, and the config and weights of the VAE; embeddings under the caption and the files of
    the text encoders. Only what is missing is encoded, and no encoder is loaded if nothing is. Each
    entry is encoded by itself, so that it does not depend on the others; the first rank encodes
    all.

    Args:
        folder: folder of the images, as ImageFolder reads it, with captions in metadata.jsonl or
            metadata.csv, or in a .txt file beside each image.
        pipeline: folder of the diffusers pipeline whose VAE and text encoders are used.
        size: height and width of the images in pixels; 0 for the size of the pipeline's network.
        fit: crop, pad or exact, as in ImageFolder.
        flip: True mirrors half of the images; both versions are encoded.
        captions: True reads captions if there are any; False labels by sub-folder.
        unreadable: refuse images that cannot be read, or skip them.
        cache: folder of the cache, on a disk that all ranks share.

    Raises:
        ValueError: There are no images, unreadable ones, some without a caption, or no VAE.
    """

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
    ) -> None:
        from diffcore.integrations.diffusers.loading.index import PipelineIndex

        self.pipeline, self.flip = PipelineIndex(Path(pipeline)), flip
        self.files = ImageFolder(
            folder, size or self.pipeline.image_size, "RGB", fit, unreadable=unreadable
        )
        found = read_captions(Path(folder), self.files.paths) if captions else []
        self.texts = tuple(sorted(set(found)))
        labels = {text: label for label, text in enumerate(self.texts)}
        self.labels = [labels[text] for text in found] or self.files.labels
        self.keys = [
            digest(hash_file(path), fit, str(self.files.size)) for path in self.files.paths
        ]
        self.rows = (
            [digest(text, str(self.files.size)) for text in (*self.texts, NULL)] if found else []
        )
        self.latents = Cache(Path(cache) / "latents" / digest(*self.pipeline.paths("vae")))
        text = self.pipeline.paths("text_encoder", "tokenizer") if found else []
        # The classes of the pipeline and the config of its network determine what is encoded.
        configs = (self.pipeline.content, self.pipeline.config(self.pipeline.network_name))
        self.embeddings = Cache(Path(cache) / "embeddings" / digest(*map(str, configs), *text))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The mean of the latents, and the label."""
        return self.latents.read(self.keys[index])["mean"], self.labels[index]

    is_latent = True

    def item(self, index: int, seed: int, position: int) -> tuple[Tensor, int]:
        """The latents drawn at a position of the run, and the label."""
        key = self.keys[index]
        entry = self.latents.read(
            _mirrored(key) if self.flip and is_mirrored(seed, position) else key
        )
        mean, std = entry["mean"], entry["std"]
        return mean + std * normal(seed, Stream.LATENT, position, mean.shape)[0], self.labels[index]

    @property
    def content_hash(self) -> str:
        """Hash of everything that the items and the embeddings are made of."""
        made = (self.latents.folder.name, self.embeddings.folder.name if self.rows else "")
        return digest(*made, *self.keys, *map(str, self.labels), *self.rows)

    def prompts(self) -> "Prompts":
        """The embeddings that labels index, with the empty prompt as the null condition."""
        from diffcore.integrations.diffusers.loading.prompts import Prompts

        rows = [self.embeddings.read(key) for key in self.rows]
        return Prompts(
            {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, self.texts
        )

    def label_wrapper(self, device: torch.device) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a text-conditioned network so that it accepts labels.

        Args:
            device: device of the network; the embeddings are copied to it unless they are large.

        Returns:
            The wrapper; the identity without captions.
        """
        from diffcore.integrations.diffusers.loading.prompts import PromptNetwork

        if not self.texts:
            return lambda network: network
        bank = self.prompts()
        small = sum(value.nbytes for value in bank.tensors.values()) < LARGE
        return partial(
            PromptNetwork,
            prompts=bank.map(lambda value: value.to(device)) if small else bank,
            move_prompts=False,
        )

    @property
    def vae(self) -> nn.Module:
        """The VAE, which a run copies into its diffusers pipeline."""
        return self.pipeline.read("vae")

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) of latents (N, C, h, w), decoded by the VAE."""
        vae = self._vae(x.device)
        return torch.cat([vae.decode(one) for one in x.split(1)])

    # Making

    @property
    def is_ready(self) -> bool:
        """True if every latent and embedding is in the cache."""
        return not (self.latents.missing(self._images()) or self.embeddings.missing(self.rows))

    def prepare(self, device: torch.device, is_main_process: bool) -> None:
        """Encode what is missing on the first rank; the others wait for it."""
        if is_main_process:
            self._make_latents(device)
            self._make_embeddings(device)
        while not self.is_ready:
            time.sleep(POLL_SECONDS)
            self.latents.rescan()
            self.embeddings.rescan()

    def _images(self) -> dict[str, tuple[int, bool]]:
        """Key of each latent -> (index of its image, True if it is mirrored)."""
        keys = {key: (index, False) for index, key in enumerate(self.keys)}
        return keys | (
            {_mirrored(key): (index, True) for key, (index, _) in keys.items()} if self.flip else {}
        )

    @torch.no_grad()
    def _make_latents(self, device: torch.device) -> None:
        images = self._images()
        if missing := self.latents.missing(images):
            vae = self._vae(device)

            def entries(keys: Sequence[str]) -> Entries:
                for index, mirror in (images[key] for key in keys):
                    image = self.files[index][0].to(device)[None]
                    mean, std = vae.posterior(image.flip(-1) if mirror else image)
                    yield {"mean": mean[0], "std": std[0]}

            self.latents.make(missing, entries, "latents")

    def _make_embeddings(self, device: torch.device) -> None:
        from diffcore.integrations.diffusers import encode_prompts

        if missing := self.embeddings.missing(self.rows):
            pipeline = self.pipeline.read_text_pipeline().to(device)
            texts, size = (
                dict(zip(self.rows, self.texts, strict=False)),
                (self.files.size, self.files.size),
            )

            def entries(
                keys: Sequence[str],
            ) -> Entries:  # the null row, which encode_prompts puts last, is the last of all
                bank = encode_prompts(
                    pipeline, [texts[key] for key in keys if key in texts], size=size
                )
                return (
                    {name: value[place] for name, value in bank.tensors.items()}
                    for place in range(len(keys))
                )

            self.embeddings.make(missing, entries, "captions")

    def _vae(self, device: torch.device) -> "Latents":
        from diffcore.integrations.diffusers.loading.vae import Latents

        return Latents(self.vae.to(device).eval())


def _mirrored(key: str) -> str:
    return digest(key, "mirrored")
