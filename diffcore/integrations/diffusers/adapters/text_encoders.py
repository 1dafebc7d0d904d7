"""The text encoders of a pipeline, trained together with its network on tokens.

tokens -> text encoders -> arguments of the network
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffcore.integrations.diffusers.adapters.layer_names import name_in_files
from diffcore.integrations.diffusers.adapters.lora import TextLoRA
from diffcore.integrations.diffusers.adapters.textual_inversion import (
    ExtendedEmbedding,
    NewWord,
)
from diffcore.integrations.diffusers.families import TextCondition
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.integrations.diffusers.loading.prompts import TOKENS
from diffcore.io.network_size import check_memory

__all__ = ["TextEncoders"]

IS_ZERO = "is_zero"
"""Entry of the tokens that is True for prompts whose encoding is zero."""
FROZEN = "frozen"
"""Entry of the tokens with the states of the text encoders that are not trained."""
KEPT = 4
"""Number of sets of prompts whose tokens are kept: of training, validation, previews, another."""


class TextEncoders(nn.Module):
    """Text encoders with an adapter, or with the embeddings of a new word, and their tokenizers.

    All other weights are frozen, in float32.

    Args:
        index: pipeline of Stable Diffusion or Flux. T5 is not trained: it encodes each prompt
            once, when it is tokenised.
        lora: adapter of each text encoder; rank 0: none.
        word: new word whose embeddings are trained.

    Raises:
        ValueError: the text encoders of the pipeline's family are not trained here, or the adapter
            or the word does not fit them.
    """

    def __init__(self, index: PipelineIndex, lora: TextLoRA, word: NewWord) -> None:
        super().__init__()
        condition = index.family.condition
        if not isinstance(condition, TextCondition) or not condition.trained_encoders:
            raise ValueError(
                f"{index.folder} holds {index.family.name}, whose text encoders are not trained: "
                "start from Stable Diffusion or Flux, or leave text_lora and word out"
            )
        if word.word and condition.has_frozen_encoders:
            raise ValueError(
                f"{index.folder} holds {index.family.name}, whose T5 is not trained and would not "
                "know a new word: leave word out, or start from Stable Diffusion 1, 2 or XL"
            )
        self.index = index
        self.condition, self.lora, self.word = condition, lora, word
        self.names = condition.trained_encoders
        self.has_zeros = bool(index.content.get("force_zeros_for_empty_prompt"))
        self.tokenizers: dict[str, Any] = {
            name: index.read(name.replace("text_encoder", "tokenizer")) for name in self.names
        }
        self.tokens: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.embeddings: dict[str, ExtendedEmbedding] = {}
        for name in self.names:
            encoder = index.read(name).requires_grad_(False)
            if lora.rank:
                lora.add_to(encoder, condition.unread_layers(name, encoder))
            if word.word:
                self.embeddings[name] = word.add_to(self.tokenizers[name], encoder)
            # In a ModuleDict the whole encoder would be one block that is compiled and sharded, in
            # place of its layers.
            self.add_module(name, encoder)

    def tokenize(self, texts: Sequence[str], negative: str = "") -> dict[str, Tensor]:
        """Tokenise prompts as the pipeline does, once: validation and previews come back to them.

        Args:
            texts: K prompts.
            negative: text of the null condition; "": what the pipeline uses without a negative
                prompt (zeros for many XL pipelines).

        Returns:
            `tokens.NAME` of each text encoder -> (K + 1, L) ids; `tokens.is_zero` -> (K + 1,);
            `tokens.frozen` -> (K + 1, L, D) states of text encoders that are not trained.
        """
        prompts = (*texts, negative)
        if prompts not in self.tokens:
            if len(self.tokens) == KEPT:
                del self.tokens[next(iter(self.tokens))]
            self.tokens[prompts] = self._tokenize(prompts)
        return self.tokens[prompts]

    def _tokenize(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        """The tokens of texts, of which the last is that of the null condition."""
        is_zero = torch.zeros(len(texts), dtype=torch.bool)
        is_zero[-1] = self.has_zeros and not texts[-1]
        prompts = [self.word.expand(text) for text in texts]
        tokens = {
            f"{TOKENS}.{name}": tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )["input_ids"]
            for name, tokenizer in self.tokenizers.items()
        }
        if self.condition.has_frozen_encoders:
            tokens[f"{TOKENS}.{FROZEN}"] = self._frozen_states(texts)
        return tokens | {f"{TOKENS}.{IS_ZERO}": is_zero}

    @torch.no_grad()
    def _frozen_states(self, texts: tuple[str, ...]) -> Tensor:
        """The states (K + 1, L, D) of the text encoders that are not trained."""
        pipeline = self.index.read_text_pipeline()
        states: list[Tensor] = []
        for number, text in enumerate(texts, 1):
            encoded = self.condition.encode(pipeline, text, number == len(texts))
            found = self.condition.frozen_states(pipeline, encoded)
            assert found is not None
            if not states:
                size = len(texts) * found.numel() * found.element_size()
                check_memory(size, f"the states of T5 for {len(texts)} prompts")
            states.append(found.clone())
        return torch.cat(states)

    def forward(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode tokenised prompts.

        Args:
            tokens: (B, L) ids by the name of the text encoder, `is_zero` (B,), and the states
                `frozen` (B, L, D) if there are text encoders that are not trained.

        Returns:
            Argument of the network's forward -> value (B, ...); a dot in the name leads into a
            dictionary.
        """
        arguments = self.condition.encode_tokens(
            [self.get_submodule(name) for name in self.names],
            [tokens[name] for name in self.names],
            tokens.get(FROZEN),
        )
        is_zero = tokens[IS_ZERO]
        return {
            name: value.masked_fill(is_zero.view(-1, *[1] * (value.ndim - 1)), 0)
            for name, value in arguments.items()
        }

    def components(self) -> dict[str, Any]:
        """The components of a pipeline that these are.

        Returns:
            Name -> text encoder, which is moved to the host, or tokenizer.
        """
        found: dict[str, Any] = {}
        for name in self.names:
            # On the host, as `read_text_pipeline` reads them.
            found[name] = self.get_submodule(name).cpu()
            found[name.replace("text_encoder", "tokenizer")] = self.tokenizers[name]
        return found

    def adapter_arguments(self) -> dict[str, Any]:
        """The arguments of diffusers' `save_lora_weights` for the adapters of the text encoders.

        Returns:
            Layers and metadata by the names of the arguments; {} without an adapter.
        """
        found: dict[str, Any] = {}
        for name in self.names if self.lora.rank else ():
            encoder = self.get_submodule(name)
            # With "auto" peft would look for the encoder on the hub.
            layers = get_peft_model_state_dict(encoder, save_embedding_layers=False)
            found[f"{name}_lora_layers"] = {
                name_in_files(encoder, layer): value for layer, value in layers.items()
            }
            found[f"{name}_lora_adapter_metadata"] = self.lora.written_config(encoder)
        return found

    def learned_embeddings(self) -> dict[str, Tensor]:
        """The embeddings of the new word.

        Returns:
            Name of each text encoder -> (vectors, D); {} without a word.
        """
        return {name: embedding.new.detach() for name, embedding in self.embeddings.items()}
