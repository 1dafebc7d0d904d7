"""Textual inversion: the embeddings of a new word are trained, and nothing else of the tokens.

Gal et al. 2022 (2208.01618).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffcore.io.files import write_file
from diffcore.io.safetensors import check_header

__all__ = ["LEARNED_EMBEDDINGS", "ExtendedEmbedding", "NewWord", "add_word", "write_word"]

LEARNED_EMBEDDINGS = "learned_embeds.safetensors"
"""Name of the file of a new word in a folder, which diffusers reads."""
XL_KEYS = ("clip_l", "clip_g")
"""Entries of the file of a new word of XL, for its first and its second text encoder."""


@dataclass(frozen=True)
class NewWord:
    """A new word of the prompts, whose embeddings are trained (textual inversion).

    A prompt that contains the word gets one token for each embedding: `<cat> <cat>_1 <cat>_2`, as
    in diffusers.

    Args:
        word: the new word, such as <cat>, which the captions contain; "": none.
        initial: word of one token, such as cat, whose embedding the new ones start from.
        vectors: number of embeddings of the word.

    Raises:
        ValueError: the word has no initial one or contains white space, or a number is out of
            range.

    Example:
        >>> NewWord("<cat>", "cat", vectors=2).tokens
        ['<cat>', '<cat>_1']
    """

    word: str = ""
    initial: str = ""
    vectors: int = 1

    def __post_init__(self) -> None:
        if bool(self.word) != bool(self.initial):
            raise ValueError(
                f"word is {self.word!r} and initial is {self.initial!r}, expected both: a new "
                "word, such as <cat>, and the word that it starts from, such as cat"
            )
        if self.word.split() != [self.word] * bool(self.word):
            raise ValueError(f"word is {self.word!r}, expected one without white space, as <cat>")
        if self.vectors < 1:
            raise ValueError(f"vectors is {self.vectors}, expected at least 1")

    @property
    def tokens(self) -> list[str]:
        """The tokens of the word, one for each embedding."""
        return [self.word, *(f"{self.word}_{index}" for index in range(1, self.vectors))]

    def expand(self, text: str) -> str:
        """Replace the word in a prompt by its tokens.

        Args:
            text: prompt.

        Returns:
            The prompt with one token for each embedding.
        """
        return text.replace(self.word, " ".join(self.tokens)) if self.word else text

    def add_to(self, tokenizer: Any, encoder: Any) -> "ExtendedEmbedding":
        """Add the tokens to a tokenizer, and their embeddings to a text encoder, both in place.

        Args:
            tokenizer: tokenizer of transformers.
            encoder: its text encoder.

        Returns:
            The embedding of the text encoder.

        Raises:
            ValueError: the word is known to the tokenizer, or the initial one is not one token.
        """
        initial = tokenizer(self.initial, add_special_tokens=False)["input_ids"]
        if len(initial) != 1:
            raise ValueError(
                f"initial is {self.initial!r}, which the tokenizer splits into {len(initial)} "
                "tokens: expected a word of one token, such as cat"
            )
        first, known = len(tokenizer), tokenizer.get_vocab()
        tokenizer.add_tokens(self.tokens)
        ids = tokenizer(self.expand(self.word), add_special_tokens=False)["input_ids"]
        if ids != list(range(first, first + self.vectors)):
            reason = "has as a token" if self.word in known else "does not keep whole"
            raise ValueError(
                f"word is {self.word!r}, which the tokenizer {reason}: expected a new one, such as "
                "<my-cat>"
            )
        embedding = ExtendedEmbedding(
            encoder.get_input_embeddings(), first, initial[0], self.vectors
        )
        encoder.set_input_embeddings(embedding)
        return embedding


class ExtendedEmbedding(nn.Module):
    """An embedding of tokens with further rows, which alone are trained.

    Args:
        base: embedding of the other tokens, which is frozen.
        first: id of the first new token.
        initial: id of the token whose row the new ones start from.
        count: number of new tokens.
    """

    def __init__(self, base: nn.Embedding, first: int, initial: int, count: int) -> None:
        super().__init__()
        self.base, self.first = base.requires_grad_(False), first
        self.new = nn.Parameter(base.weight.detach()[initial].float().repeat(count, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: (B, L) token ids.

        Returns:
            (B, L, D) embeddings.
        """
        is_new = ids >= self.first
        # Both are read at every position, so that no value is read from the device.
        new = self.new[(ids - self.first).clamp(0, len(self.new) - 1)]
        return torch.where(is_new[..., None], new, self.base(ids.masked_fill(is_new, 0)))


def write_word(file: str | Path, word: str, embeddings: Mapping[str, Tensor]) -> None:
    """Write the embeddings of a new word as diffusers' `load_textual_inversion` reads them.

    Args:
        file: safetensors file to write or replace.
        word: the word.
        embeddings: name of each text encoder -> (vectors, D).
    """
    names = [word] if len(embeddings) == 1 else XL_KEYS
    rows = dict(zip(names, (value.contiguous() for value in embeddings.values()), strict=True))
    # One entry of metadata: safetensors writes several in no fixed order.
    write_file(file, save(rows, {"word": word}))


def add_word(pipeline: Any, file: str | Path) -> None:
    """Add a new word to the tokenizers and the text encoders of a pipeline, in place.

    Args:
        pipeline: pipeline of diffusers with its text encoders.
        file: file that `write_word` wrote.

    Raises:
        ValueError: the file cannot be read, holds no new word, or the word of another pipeline; or
            the pipeline has the word already.
    """
    check_header(file)
    try:
        with safe_open(file, "pt") as content:
            word = (content.metadata() or {}).get("word", "")
            names = content.keys()
            rows = {name: content.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    keys = [word] if word in rows else XL_KEYS
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    if not word or len(encoders) != len(keys) or rows.keys() != set(keys):
        raise ValueError(
            f"{file} holds {', '.join(sorted(rows))}, expected the embeddings of a new word for "
            f"{len(encoders)} text encoders: name the pipeline that it was trained for"
        )
    for name, key in zip(sorted(encoders), keys, strict=True):
        encoder = getattr(pipeline, name)
        width = encoder.get_input_embeddings().weight.shape[1]
        if rows[key].ndim != 2 or rows[key].shape[1] != width:
            raise ValueError(
                f"{file} has embeddings of shape {tuple(rows[key].shape)}, expected (vectors, "
                f"{width}) of {name}: name the pipeline that it was trained for"
            )
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        if word in tokenizer.get_vocab():
            raise ValueError(
                f"{file} holds {word}, which the tokenizer has already: add one of the two words"
            )
        pipeline.load_textual_inversion(
            {word: rows[key]}, tokenizer=tokenizer, text_encoder=encoder
        )
