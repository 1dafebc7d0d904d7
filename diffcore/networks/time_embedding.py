"""Embeddings of further numbers that are added to a network's embedding of the time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from diffcore.core.network import NetworkAdapter, class_name, network_config
from diffcore.networks.embedding import ConditionEmbedding, sinusoids

__all__ = ["EmbeddingAdapter", "added_to_time", "build_addition", "features_added_to_time"]

NAMES = ("time_embedding", "timestep_embedder")
"""Attributes of diffusers' networks that hold the embedding of the time."""

_ADDED: ContextVar[Tensor | None] = ContextVar("_ADDED", default=None)
"""What the embeddings of the time add in the present call; a context has it, so threads may."""


class EmbeddingAdapter(NetworkAdapter):
    """A network that receives a further number, whose embedding is added to that of the time.

    Args:
        network: class and options of the network.
        scale: factor of the number in its sinusoids.
        number: what the number is, for messages.

    Raises:
        ValueError: the scale is not positive and finite.
    """

    def __init__(self, network: Callable[[], nn.Module], scale: float, number: str) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}, expected a positive factor of {number}")
        self.network, self.scale = network(), scale
        self.config = network_config(self.network)


def build_addition(
    network: nn.Module, names: Sequence[str] = (), features: int = 0
) -> nn.Sequential:
    """An embedding of features, whose last layer is 0, and hooks that add it to that of the time.

    Args:
        network: network with an embedding of the time; it receives the hooks.
        names: names of the modules that embed the time, (B, width) each; (): found by the names
            that diffusers gives them.
        features: number of features; 0: the width of the embedding of the time, as sinusoids of a
            number have.

    Returns:
        W' silu(W s + b) + b' with W' = 0 and b' = 0, for features s (B, features).

    Raises:
        ValueError: no module embeds the time, or its width is odd or unknown.
    """
    modules = _time_embeddings(network, names)
    width = _width(modules)
    first, last = nn.Linear(features or width, width), nn.Linear(width, width)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    for module in modules:
        if _add not in module._forward_hooks.values():  # adapters may be nested
            module.register_forward_hook(_add)
    return nn.Sequential(first, nn.SiLU(), last)


@contextmanager
def added_to_time(addition: nn.Sequential, number: Tensor) -> Iterator[None]:
    """Context in which embeddings of the time are those of the time and of a further number.

    Args:
        addition: result of `build_addition`.
        number: (B,) numbers, scaled such that they reach tens to hundreds.

    Yields:
        None.
    """
    width = next(addition.parameters()).shape[1]
    with features_added_to_time(addition, sinusoids(number, width)):
        yield


@contextmanager
def features_added_to_time(addition: nn.Sequential, features: Tensor) -> Iterator[None]:
    """Context in which embeddings of the time are those of the time and of further features.

    Args:
        addition: result of `build_addition`.
        features: (B, features) features.

    Yields:
        None.
    """
    added = addition(features.to(next(addition.parameters()).dtype))
    outer = _ADDED.get()
    token = _ADDED.set(added if outer is None else outer + added)
    try:
        yield
    finally:
        _ADDED.reset(token)


def _add(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """The output of a time embedding plus the embeddings of further numbers."""
    added = _ADDED.get()
    if added is None:
        raise RuntimeError(
            f"the {type(module).__name__}, which embeds the time, was evaluated outside of the "
            "adapter around its network (TwoTimes, GuidanceEmbedding or NoiseEmbedding): call the "
            "adapter itself, and train without checkpointing of blocks that embed the time"
        )
    return output + added.to(output.dtype)


def _time_embeddings(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of a network that embed the time."""
    modules = dict(network.named_modules())
    if names:
        if missing := [name for name in names if name not in modules]:
            raise ValueError(
                f"embeddings has {missing[0]!r}, which the {class_name(network)} does not have: "
                "name modules that return the embedding of the time"
            )
        return [modules[name] for name in names]
    found = [
        module
        for name, module in modules.items()
        if name.rpartition(".")[2] in NAMES or isinstance(module, ConditionEmbedding)
    ]
    if not found:
        raise ValueError(
            f"the {class_name(network)} has no module {' or '.join(NAMES)}: name the modules that "
            "embed the time in the option embeddings of the adapter"
        )
    return found


def _width(modules: Sequence[nn.Module]) -> int:
    """The number of features of the embeddings, that of their last linear layers."""
    linear = [
        [layer for layer in module.modules() if isinstance(layer, nn.Linear)] for module in modules
    ]
    widths = {layers[-1].out_features for layers in linear if layers}
    if len(widths) != 1 or next(iter(widths)) % 2:
        raise ValueError(
            f"the embeddings of the time end in linear layers of {sorted(widths)} features, "
            "expected one even number for all of them"
        )
    return widths.pop()
