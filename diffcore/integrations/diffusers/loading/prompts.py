"""A text condition is a label into a bank of encoded prompts: labels 0 .. K-1 are the prompts, and K, the null label, is none.

So a network that is told text is asked as one that is told a class: guidance, dropout, sampling and inversion are the same.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import read_weights_and_metadata, write_weights


@dataclass(frozen=True, eq=False)
class Prompts:
    """K encoded prompts, and in row K the null condition: the empty or the negative prompt.

    Args:
        tensors: (K + 1, ...) under the names by which the network's forward takes them; a dot leads into a dictionary, as in
            added_cond_kwargs.text_embeds.
        texts: the K prompts.

    Raises:
        ValueError: a tensor has another number of rows.
    """

    tensors: Mapping[str, Tensor]
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        rows = {name: value.shape[0] if value.ndim else 0 for name, value in self.tensors.items()}
        if not rows or set(rows.values()) != {len(self) + 1}:
            raise ValueError(
                f"the rows are {rows or 'none'}, expected {len(self) + 1} of each tensor: {len(self)} prompts and the null "
                f"condition"
            )

    def __len__(self) -> int:
        """K."""
        return len(self.texts)

    def arguments(self, labels: Tensor, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The network's keyword arguments for labels (B,), on their device; numbers that are not whole in the dtype given.

        Only the rows asked for are moved. Where the bank is on another device than the labels, this waits for the labels.
        """
        arguments: dict[str, Any] = {}
        for name, bank in self.tensors.items():
            row = bank[labels.to(bank.device)]
            *path, last = name.split(".")
            place = arguments
            for key in path:
                place = place.setdefault(key, {})
            place[last] = row.to(labels.device, dtype if row.is_floating_point() else None)
        return arguments

    def map(self, function: Callable[[Tensor], Tensor]) -> "Prompts":
        """The same prompts with each tensor mapped, such as to a device."""
        return Prompts({name: function(value) for name, value in self.tensors.items()}, self.texts)

    def save(self, path: Path) -> None:
        """Write them as safetensors."""
        write_weights(
            path,
            {name: value.cpu() for name, value in self.tensors.items()},
            texts=json.dumps(self.texts),
        )

    @classmethod
    def load(cls, path: Path) -> "Prompts":
        """The prompts saved at `path`.

        Raises:
            ValueError: it is missing, changed, or holds no prompts.
        """
        tensors, facts = read_weights_and_metadata(path)
        if "texts" not in facts:
            raise CorruptFileError(f"{path} holds no prompts, expected what Prompts.save wrote")
        return cls(tensors, tuple(json.loads(facts["texts"])))


class Prompted(nn.Module):
    """network(x, timestep=time, **prompts.arguments(class_labels)): a network of diffusers that is told text, asked by label.

    The bank follows the module to its device, and is no part of its state.

    Args:
        network: whose forward takes x, timestep, and what the prompts are named after.
        prompts: the bank.
        follow: whether the bank moves with the module. One too large for the device stays where it is; then each call waits for
            its labels.
    """

    def __init__(self, network: nn.Module, prompts: Prompts, follow: bool = True) -> None:
        super().__init__()
        self.network, self.prompts, self.follow = network, prompts, follow
        self.config = getattr(network, "config", None)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Any:
        """The network's answer; without labels, to the null condition."""
        if class_labels is None:
            class_labels = torch.full((len(x),), len(self.prompts), device=x.device)
        return self.network(x, timestep=time, **self.prompts.arguments(class_labels, x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.follow:
            self.prompts = self.prompts.map(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
