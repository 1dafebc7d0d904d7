"""A pipeline's call of its network as a denoiser, which guidance rules evaluate.

The two halves of the call are two labels of one network, 0 for the condition and 1, the null label,
for its negative. So rules and references are used as in the sampling loop of diffcore. Every
argument with 2B entries is indexed with its samples: embeddings, ControlNet residuals, image
embeddings of IP-adapters, also inside lists and dictionaries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffcore.caches.cached_network import CachedNetwork
from diffcore.core.conditions import BatchCondition, labels_of
from diffcore.core.denoiser import extract_tensor
from diffcore.core.prediction import (
    Prediction,
    at_least_float32,
    predict,
    scale_input,
    unscale_input,
)
from diffcore.core.process import Process
from diffcore.schedules import Level

__all__ = ["PipelineDenoiser", "split_input"]

INPUT_NAMES = ("sample", "hidden_states")
"""Names of x in the forward of diffusers' networks."""


@dataclass
class PipelineDenoiser:
    """A pipeline's call of its network (2B samples) as a denoiser of B samples.

    Label 0 is the condition, and label 1, the null label, its negative.

    Args:
        network: the network, whose layers a reference may alter.
        forward: the network's original forward.
        process: the process, of one class; of none if the pipeline passes no negative half.
        x: the pipeline's input, 2B samples, or B if the process has no class.
        args: the forward's other positional arguments.
        kwargs: the forward's other keyword arguments.
        conditional_first: whether the first B samples are those with the condition.
        channels: output channels of the network, or None; further channels of an image are no part
            of x.
        cached: the network with its cache; None without a cache.
        output: the network's first output, which has the type that the pipeline expects.
    """

    network: nn.Module
    forward: Callable[..., Any]
    process: Process
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditional_first: bool
    channels: int | None = None
    cached: CachedNetwork | None = None
    output: Any = None

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's input."""
        return self.x.device

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return len(self.x) // (2 if self.process.classes else 1)

    def sample(self, level: Level) -> Tensor:
        """The noisy samples x (B, ...) in float32 or better.

        EDM's input scaling is undone, and channels that are no part of x, such as a mask and a
        masked image, are left out.
        """
        channels = self.channels if self.x.ndim > 3 else None
        x = at_least_float32(self.x[: self.batch_size, :channels])
        return unscale_input(self.process.prediction, x, level, self.process.sigma_data)

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        """Predictions for any number of these samples, under label 0 or 1."""
        if self.cached is None:
            return self._evaluate(x, level, condition)
        return self.cached.evaluate(
            lambda: self._evaluate(x, level, condition), x.shape, level, condition
        )

    def _evaluate(self, x: Tensor, level: Level, condition: BatchCondition | None) -> Prediction:
        process = self.process
        indices = self._indices(labels_of(condition), len(x), x.device)
        args, kwargs = self._arguments(indices)
        scaled = scale_input(process.prediction, x, level, process.sigma_data)
        full = scaled.to(self.x.dtype)
        if self.x.shape[1] > x.shape[1]:
            full = torch.cat([full, self.x[indices, x.shape[1] :]], 1)
        output = self.forward(full, *args, **kwargs)
        self.output = output if self.output is None else self.output
        mean = extract_tensor(output)[:, : x.shape[1]].to(x.dtype)
        return predict(process.prediction, mean, x, level, process.sigma_data)

    def pipeline_output(self, guided: Tensor) -> Any:
        """The guided output in the form that the pipeline expects.

        Args:
            guided: guided output of the network (B, ...).

        Returns:
            An object of the type of the network's output, with the guided output in both halves,
            in its dtype, and with its variance channels.
        """
        output = extract_tensor(self.output)
        full, size = guided.to(output.dtype), self.batch_size
        if output.shape[1] > guided.shape[1]:
            full = torch.cat([full, output[:size, guided.shape[1] :]], 1)
        if len(self.x) > size:
            full = torch.cat([full, full])
        return (full,) if isinstance(self.output, tuple) else type(self.output)(sample=full)

    def _indices(self, condition: Tensor | None, count: int, device: torch.device) -> Tensor:
        """Indices into the pipeline's 2B samples, of `count` samples under their labels."""
        size = self.batch_size
        within_half = torch.arange(size, device=device)
        if count > size:
            within_half = within_half.repeat(count // size)
        if condition is None:
            return within_half
        half = condition if self.conditional_first else 1 - condition
        return torch.add(within_half, half.to(device), alpha=size)

    def _arguments(self, indices: Tensor) -> Any:
        """The forward's other arguments for these samples."""
        total = len(self.x)

        def select(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[indices] if value.ndim and len(value) == total else value
            return tree_map(select, value) if isinstance(value, (list, tuple, dict)) else value

        args = tuple(select(value) for value in self.args)
        return args, {name: select(value) for name, value in self.kwargs.items()}


def split_input(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """x among the arguments of a network's forward, and the other arguments.

    Args:
        args: positional arguments; x is the first, if there are any.
        kwargs: keyword arguments; else x is `sample` or `hidden_states`.

    Returns:
        x, the other positional arguments, the other keyword arguments.
    """
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in INPUT_NAMES if name in kwargs)
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
