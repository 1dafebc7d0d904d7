"""Textual inversion: the embeddings of a new word are trained, and nothing else of the tokens.

Gal et al. 2022 (2208.01618).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExtendedEmbedding", "NewWord"]


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
