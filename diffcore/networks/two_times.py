"""Networks of two times: a network of one time that also receives the time of a second level."""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from diffcore.core.network import NetworkAdapter, class_name, network_config
from diffcore.networks.embedding import ConditionEmbedding, sinusoids

__all__ = ["TwoTimes"]

NAMES = ("time_embedding", "timestep_embedder")
"""Attributes of diffusers' networks that hold the embedding of the time."""

_ADDED: ContextVar[Tensor | None] = ContextVar("_ADDED", default=None)
"""What the embeddings of the time add in the present call; a context has it, so threads may."""


class TwoTimes(NetworkAdapter):
    """A network that receives a second time, for processes that estimate the mean velocity.

        e = E(t) + W' silu(W s(c (t - r)) + b) + b',   F = network(x, t, ...) with e for E(t)

    E is the network's own embedding of the time t, s are sinusoids, and r is the time of the level
    at which the step ends. W' and b' are 0 at initialisation, so that the network starts as the
    network of one time: a run can start from the weights of that one (`init`). Geng et al. 2025
    (2505.13447, table 1c) embed t - r too.

    Args:
        network: class and options of the network: a UNet2DModel, UNet2DConditionModel or
            DiTTransformer2DModel of diffusers, a Perceptron or UNet3d, or one whose embedding is
            named in `embeddings`.
        embeddings: names of the modules that embed the time, (B, width) each; []: found by the
            names that diffusers gives them.
        scale: factor c of t - r, such that it reaches tens to hundreds; 1 for time conditioning
            from 0 to 1000.

    Raises:
        ValueError: no module embeds the time, or the scale is not positive and finite.

    Example:
        >>> import torch
        >>> from diffcore.networks import Perceptron
        >>> network = TwoTimes(lambda: Perceptron([2], width=8))
        >>> network(torch.ones(3, 2), torch.full((3,), 999.0), end_time=torch.zeros(3)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        embeddings: Sequence[str] = (),
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}, expected a positive factor of t - r")
        self.network, self.scale = network(), scale
        self.config = network_config(self.network)
        modules = _time_embeddings(self.network, embeddings)
        width = _width(modules)
        first, last = nn.Linear(width, width), nn.Linear(width, width)
        self.interval = nn.Sequential(first, nn.SiLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        for module in modules:
            module.register_forward_hook(_add)

    def forward(self, x: Tensor, timestep: Tensor, end_time: Tensor, **arguments: Any) -> Any:
        """The network's output for x and both times.

        Args:
            x: noisy samples (B, *shape).
            timestep: time input (B,) of the level of x.
            end_time: time input (B,) of the level at which the step ends.
            **arguments: other arguments of the network.

        Returns:
            The output of the network, of the shape of x.
        """
        weight = next(self.interval.parameters())
        features = sinusoids(self.scale * (timestep - end_time), weight.shape[1])
        token = _ADDED.set(self.interval(features.to(weight.dtype)))
        try:
            return self.network(x, timestep, **arguments)
        finally:
            _ADDED.reset(token)


def _add(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """The output of a time embedding plus that of the second time."""
    added = _ADDED.get()
    if added is None:
        raise RuntimeError(
            f"the {type(module).__name__} of TwoTimes was evaluated outside of its forward: call "
            "the TwoTimes itself, and train without checkpointing of blocks that embed the time"
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
            "embed the time in the option embeddings of TwoTimes"
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
