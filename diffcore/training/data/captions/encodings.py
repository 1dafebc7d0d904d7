"""How captions reach a network: as text embeddings that are encoded once, or as tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from diffcore.core.network import ExportableNetwork, unwrap
from diffcore.training.data.cache import Cache, Precision, hash_content

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.index import PipelineIndex
    from diffcore.integrations.diffusers.loading.prompts import Prompts

__all__ = [
    "CachedEmbeddings",
    "CaptionEncoding",
    "CaptionEncodings",
    "NetworkTokens",
    "text_encoder_hash",
]

CaptionEncodings = Literal["embeddings", "tokens"]
NULL = "\0"
"""Text of the null condition, the empty prompt; pipelines may encode it unlike an empty caption."""


class CaptionEncoding(ABC):
    """The form in which captions reach a network.

    Args:
        pipeline: pipeline whose text encoders encode.
        size: height and width of the images in pixels.
    """

    def __init__(self, pipeline: "PipelineIndex", size: int) -> None:
        self.pipeline, self.size = pipeline, size

    def keys(self, texts: Sequence[str], negative: str = "") -> list[str]:
        """Keys of texts and of the null condition.

        Args:
            texts: K texts.
            negative: text of the null condition; "": the empty prompt.

        Returns:
            K + 1 hashes of what is encoded.
        """
        return [hash_content(text, str(self.size)) for text in (*texts, NULL + negative)]

    def is_ready(self, texts: Sequence[str]) -> bool:
        """Whether texts need no `prepare`; by default True."""
        return True

    def prepare(self, texts: Sequence[str], negative: str, device: torch.device) -> None:
        """Encode texts and the null condition before the network is built; by default nothing.

        Args:
            texts: K texts.
            negative: text of the null condition; "": the empty prompt.
            device: device of the text encoders.
        """
        return

    def rescan(self) -> None:
        """Find what other ranks have encoded; by default nothing."""
        return

    @abstractmethod
    def bank(self, texts: Sequence[str], negative: str = "") -> "Prompts | None":
        """The bank of encoded texts.

        Args:
            texts: K texts.
            negative: text of the null condition.

        Returns:
            The bank that labels index; None if only the network encodes texts.
        """

    @abstractmethod
    def wrapper(
        self, texts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        """A function that wraps a network so that labels index texts.

        Args:
            texts: K texts; text k is label k, and K the null label.
            negative: text of the null condition; "": the empty prompt.
            device: device of the network.

        Returns:
            The function.
        """


class CachedEmbeddings(CaptionEncoding):
    """Text embeddings, which are encoded once and cached.

    Args:
        pipeline: pipeline whose text encoders encode.
        size: height and width of the images in pixels.
        cache: cache of the embeddings.
        has_sizes: whether the network receives the sizes and the crop of each image.
    """

    def __init__(self, pipeline: "PipelineIndex", size: int, cache: Cache, has_sizes: bool) -> None:
        super().__init__(pipeline, size)
        self.cache, self.has_sizes = cache, has_sizes

    def is_ready(self, texts: Sequence[str]) -> bool:
        return not self.cache.missing(self.keys(texts))

    def prepare(self, texts: Sequence[str], negative: str, device: torch.device) -> None:
        from diffcore.integrations.diffusers import encode_prompts

        keys = self.keys(texts, negative)
        if missing := self.cache.missing(keys):
            pipeline = self.pipeline.read_text_pipeline(device)
            by_key = dict(zip(keys, texts, strict=False))  # without the null key
            size = (self.size, self.size)

            def entries(keys: Sequence[str]) -> Iterator[dict[str, Tensor]]:
                captions = [by_key[key] for key in keys if key in by_key]
                # The bank ends with the null condition, and the null key is the last of all keys.
                bank = encode_prompts(pipeline, captions, negative, size)
                for row in range(len(keys)):
                    yield {name: value[row] for name, value in bank.tensors.items()}

            self.cache.compute(missing, entries, "captions")

    def rescan(self) -> None:
        self.cache.rescan()

    def bank(self, texts: Sequence[str], negative: str = "") -> "Prompts":
        from diffcore.integrations.diffusers.loading.prompts import Prompts

        rows = [self.cache.read(key) for key in self.keys(texts, negative)]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Prompts(
            tensors, tuple(texts), self.pipeline.size_arguments if self.has_sizes else None
        )

    def wrapper(
        self, texts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        from diffcore.integrations.diffusers.loading.prompts import wrap_with

        return wrap_with(self.bank(texts, negative), device)


class NetworkTokens(CaptionEncoding):
    """Tokens, for a network that trains its text encoders and encodes them in every step.

    The network tokenises: it may have new words.
    """

    def bank(self, texts: Sequence[str], negative: str = "") -> None:
        return None

    def wrapper(
        self, texts: Sequence[str], negative: str, device: torch.device
    ) -> Callable[[nn.Module], nn.Module]:
        return partial(self._wrap, texts=texts, negative=negative, device=device)

    def _wrap(
        self, network: nn.Module, texts: Sequence[str], negative: str, device: torch.device
    ) -> nn.Module:
        from diffcore.integrations.diffusers.loading.prompts import wrap_with

        own, bank = unwrap(network), None
        if isinstance(own, ExportableNetwork):
            bank = own.tokenize(texts, negative, self.size)
        if bank is None:
            raise ValueError(
                "data.text is tokens, but the network trains no text encoder: set "
                "network.text_lora.rank or network.word.word, or data.text: embeddings"
            )
        return wrap_with(bank, device)(network)


def text_encoder_hash(pipeline: "PipelineIndex", has_texts: bool, dtype: Precision) -> str:
    """Hash of everything besides a caption that its embeddings depend on.

    Args:
        pipeline: pipeline whose text encoders encode.
        has_texts: whether there are captions.
        dtype: data type of the cache.

    Returns:
        The hash.
    """
    paths: list[Path] = pipeline.paths("text_encoder", "tokenizer") if has_texts else []
    # The class of the pipeline and the config of the network select the inputs of the network.
    configs = (pipeline.content, pipeline.config(pipeline.network_name))
    stored = [] if dtype == "float32" else [dtype]
    return hash_content(*map(str, configs), *paths, *stored)
