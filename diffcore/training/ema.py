"""The exponential moving average of the weights, always in float32.

shadow ← β shadow + (1-β) weights,   β(step) = min(decay, (1 + step) / (10 + step))
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Decay:
    """β(step) of the average: a pure function of the optimizer step.

    Args:
        decay: the limit of β, within [0, 1).
        warmup: whether β starts at (1 + step) / (10 + step), so that the initial weights are forgotten.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}, expected within [0, 1)")

    def __call__(self, step: int) -> float:
        """β after `step` optimizer steps."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class EMA:
    """The averaged state of a module: floating tensors are averaged in float32, others (counters) are copied.

    Elementwise, so a rank that holds a shard averages its own shard.
    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.module, self.decay = module, decay
        state = module.state_dict()
        self.shadow = {name: _averaged(value).clone() for name, value in state.items()}
        named = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers()),
        }
        self.floating = [
            (self.shadow[name], named[name]) for name in state if state[name].is_floating_point()
        ]
        self.counters = [
            (self.shadow[name], named[name])
            for name in state
            if not state[name].is_floating_point()
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module's weights after optimizer step `step`."""
        for copy, value in self.counters:
            copy.copy_(value)
        shadow, values = zip(*self.floating, strict=True)
        torch._foreach_lerp_(shadow, [value.float() for value in values], 1 - self.decay(step))

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged weights; its own come back bit for bit, also after an error."""
        own = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            self.module.load_state_dict(own)


def _averaged(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()
