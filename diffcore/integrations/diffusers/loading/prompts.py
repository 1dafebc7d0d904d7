"""Text conditions as class labels: a bank of encoded prompts, indexed by label.

Labels 0 .. K-1 are the prompts, and K, the null label, is the null condition. So guidance, dropout,
sampling and inversion of a text-conditioned network are those of a class-conditional one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffcore.core.network import network_config
from diffcore.io.files import CorruptFileError
from diffcore.io.safetensors import read_weights_and_metadata, write_weights

__all__ = ["TOKENS", "PromptNetwork", "Prompts", "set_argument", "wrap_with"]

TOKENS = "tokens"
"""Argument of a network that contains its text encoders: token ids by the name of each encoder."""
LARGE_BANK = 2**30
"""Number of bytes above which the text embeddings stay on the host."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """K encoded prompts, and at index K the null condition: the empty or the negative prompt.

    Args:
        tensors: argument of the network's forward -> its values (K + 1, ...). A dot in a name leads
            into a dictionary: `added_cond_kwargs.text_embeds`.
        texts: the K prompts.
        size_arguments: function (sizes (B, 6)) -> arguments of the network that contain the sizes
            and the crop of each image, in place of those in `tensors`, which are the default; None:
            there are none. It is not saved.

    Raises:
        ValueError: a tensor has another number of entries than K + 1.

    Example:
        >>> bank = Prompts({"states": torch.zeros(3, 5, 8)}, ("a cat", "two dogs"))
        >>> bank.arguments(torch.tensor([1, 2]))["states"].shape
        torch.Size([2, 5, 8])
    """

    tensors: Mapping[str, Tensor]
    texts: tuple[str, ...] = ()
    size_arguments: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        counts = {name: value.shape[0] if value.ndim else 0 for name, value in self.tensors.items()}
        if not counts or set(counts.values()) != {len(self) + 1}:
            raise ValueError(
                f"the tensors have {counts or 'no'} entries, expected {len(self) + 1} in each: "
                f"{len(self)} prompts and the null condition"
            )

    def __len__(self) -> int:
        """Number of prompts, K."""
        return len(self.texts)

    def arguments(
        self, labels: Tensor, dtype: torch.dtype | None = None, sizes: Tensor | None = None
    ) -> dict[str, Any]:
        """The network's keyword arguments for labels.

        Only the entries of these labels are moved to their device. If the bank is on another device
        than the labels, the host waits for the labels.

        Args:
            labels: labels (B,) from 0 to K.
            dtype: dtype of the floating-point arguments; None: as encoded.
            sizes: (B, 6) float32, sizes and crop of each image in pixels (`Crop.sizes`); None: the
                size for which the prompts were encoded, without a crop.

        Returns:
            Name -> value (B, ...), or a dictionary of these, on the device of the labels.

        Raises:
            ValueError: sizes are given, and the bank has no function for them.
        """
        own: Mapping[str, Tensor] = {} if sizes is None else self._sized(sizes)
        arguments: dict[str, Any] = {}
        for name, bank in self.tensors.items():
            entry = own[name] if name in own else bank[labels.to(bank.device)]
            entry = entry.to(labels.device, dtype if entry.is_floating_point() else None)
            set_argument(arguments, name, entry)
        return arguments

    def _sized(self, sizes: Tensor) -> Mapping[str, Tensor]:
        if self.size_arguments is None:
            raise ValueError(
                "sizes of images are given, but the prompts have no function for them: leave sizes "
                "out, or set size_arguments (PipelineIndex.size_arguments)"
            )
        return self.size_arguments(sizes)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Prompts":
        """A bank of the same prompts with the function applied to each tensor (K + 1, ...)."""
        mapped = {name: function(value) for name, value in self.tensors.items()}
        return Prompts(mapped, self.texts, self.size_arguments)

    def save(self, path: str | Path) -> None:
        """Write the bank as safetensors."""
        write_weights(
            path,
            {name: value.cpu() for name, value in self.tensors.items()},
            texts=json.dumps(self.texts),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Prompts":
        """Read a bank that `save` wrote.

        Args:
            path: the safetensors file.

        Returns:
            The bank, on the host.

        Raises:
            ValueError: the file is missing, was changed, or holds no prompts.
        """
        tensors, metadata = read_weights_and_metadata(path)
        if "texts" not in metadata:
            raise CorruptFileError(
                f"{path} holds no prompts, expected a file that Prompts.save wrote"
            )
        return cls(tensors, tuple(json.loads(metadata["texts"])))


def set_argument(arguments: dict[str, Any], name: str, value: Any) -> None:
    """Set a keyword argument of a network, in place.

    Args:
        arguments: keyword arguments.
        name: name of the argument; a dot leads into a dictionary: `added_cond_kwargs.text_embeds`.
        value: its value.
    """
    *path, last = name.split(".")
    for key in path:
        arguments = arguments.setdefault(key, {})
    arguments[last] = value


class PromptNetwork(nn.Module):
    """A text-conditioned network of diffusers, conditioned on labels of a bank of prompts.

        network(x, timestep=time, **prompts.arguments(class_labels))

    The bank moves with the module and is not part of its state.

    Args:
        network: network whose forward takes x, `timestep` and the arguments that the bank names.
        prompts: the bank.
        move_prompts: whether the bank moves with the module. A bank that is too large for the
            device stays where it is; then each call waits for its labels.
    """

    def __init__(self, network: nn.Module, prompts: Prompts, move_prompts: bool = True) -> None:
        super().__init__()
        self.network, self.prompts, self.move_prompts = network, prompts, move_prompts
        self.config = network_config(network)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        class_labels: Tensor | None = None,
        sizes: Tensor | None = None,
        **conditions: Tensor,
    ) -> Any:
        """The network's output.

        Args:
            x: noisy samples (B, C, H, W).
            time: time input (B,).
            class_labels: labels (B,); None: the null condition.
            sizes: (B, 6) sizes and crop of each image (`Crop.sizes`); None: those of the bank.
            **conditions: named conditions, which the network receives too.

        Returns:
            A tensor of the shape of x, or an object or tuple that holds it, as the network does.
        """
        if class_labels is None:
            class_labels = torch.full((len(x),), len(self.prompts), device=x.device)
        prompts = self.prompts.arguments(class_labels, x.dtype, sizes)
        return self.network(x, timestep=time, **prompts, **conditions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.move_prompts:
            self.prompts = self.prompts.map(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def wrap_with(bank: Prompts, device: torch.device) -> Callable[[nn.Module], nn.Module]:
    """A function that wraps a text-conditional network so that its labels are those of a bank.

    Args:
        bank: encoded captions.
        device: device of the network; the bank is copied to it unless it is large.

    Returns:
        The function.
    """
    is_small = sum(value.nbytes for value in bank.tensors.values()) < LARGE_BANK
    return partial(
        PromptNetwork,
        prompts=bank.map(lambda value: value.to(device)) if is_small else bank,
        move_prompts=False,
    )
