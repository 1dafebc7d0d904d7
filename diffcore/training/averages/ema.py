"""The exponential moving average (EMA) of the weights, always in float32.

shadow ← β shadow + (1-β) weights,   β(step) = min(decay, (1 + step) / (10 + step))
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffcore.training.ranks.captured_state import without_shared_memory
from diffcore.training.ranks.sharding import copy_whole, local

__all__ = ["EMA", "Decay"]


@dataclass(frozen=True)
class Decay:
    """Decay β(step) of the averaged weights, a function of the optimizer step.

    Args:
        decay: limit of β in average ← β average + (1-β) weights, within [0, 1); a larger value
            averages over more steps.
        warmup: true limits β to (1 + step) / (10 + step), so that the average forgets the initial
            weights quickly.
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
    """The averaged state of a module.

    Floating tensors are averaged in float32; other tensors (counters) are copied. The average is
    elementwise, so that a rank that holds a shard averages its shard.

    Args:
        module: module whose state is averaged.
        decay: β as a function of the step, such as `Decay`.
        copy: copy of the module whose state becomes the average, see `averaged_network`; None
            keeps the average in tensors alone.

    Raises:
        ValueError: the copy holds a part of the average in half precision.
    """

    def __init__(
        self, module: nn.Module, decay: Callable[[int], float], copy: nn.Module | None = None
    ) -> None:
        self.module, self.decay = module, decay
        state = module.state_dict()
        named = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        if copy is None:
            self.shadow = {name: _averaged(value).clone() for name, value in state.items()}
        else:
            held = copy.state_dict()
            _check_precision(held, named)
            # Of tied weights the first is that of the copy; the others are averaged beside it.
            self.shadow = without_shared_memory({name: _averaged(held[name]) for name in state})
            self.load(state)
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
        """Update the average with the module's weights after `step` optimizer steps."""
        for copy, value in self.counters:
            copy.copy_(value)
        shadow, values = zip(*self.floating, strict=True)
        average = get_ema_multi_avg_fn(self.decay(step))
        own = [local(value).float() for value in values]
        average([local(value) for value in shadow], own, 0)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Replace the average by that of a checkpoint."""
        for name, value in shadow.items():
            copy_whole(self.shadow[name], value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module has the averaged weights.

        On exit, also after an error, its weights are restored bit for bit.

        Yields:
            Nothing; the module is changed in place.
        """
        weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            self.module.load_state_dict(weights)


def _check_precision(held: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor of a copy that is not shared cannot hold its average."""
    for name, value in held.items():
        is_shared = local(value).data_ptr() == local(named[name]).data_ptr()
        if value.is_floating_point() and value.dtype != torch.float32 and not is_shared:
            raise ValueError(
                f"the objective evaluates the averaged weights, which are float32, and {name} of "
                f"the network is {value.dtype}: use float32 weights (network.float())"
            )


def _averaged(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()
