"""A network that is evaluated with a cache: what is kept for which samples, and what is counted."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from diffcore.caches.base import Cache
from diffcore.caches.integration import Integration, current_integration
from diffcore.core.condition_values import are_equal
from diffcore.core.conditions import BatchCondition
from diffcore.core.network import unwrap
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["CacheCounts", "CachedNetwork"]


class CacheCounts(NamedTuple):
    """Calls of the network so far.

    Args:
        computed: calls that computed all features.
        reused: calls that reused some.
    """

    computed: int = 0
    reused: int = 0

    @property
    def reused_share(self) -> float:
        """Share of the calls that reused features."""
        return self.reused / max(1, self.computed + self.reused)


class _Stream(NamedTuple):
    """The last evaluation of some samples: its shape and condition, and the cache's memory."""

    shape: torch.Size
    condition: BatchCondition | None
    memory: Any


class CachedNetwork:
    """A network that is evaluated with a cache.

    What is kept belongs to one integration and to samples under one condition: at a call of another
    number of rows or other conditions, as where guidance begins, all features are computed.
    Evaluations outside of an integration are those of the whole network.

    Args:
        network: the network, which must not be compiled.
        cache: rule that decides what is reused.

    Raises:
        ValueError: the network has no features that the cache can reuse, or is compiled.
    """

    def __init__(self, network: nn.Module | None, cache: Cache) -> None:
        if network is None:
            raise ValueError(f"{cache} needs a network with layers, and the denoiser has none")
        if any(module._compiled_call_impl is not None for module in network.modules()) or (
            unwrap(network) is not network
        ):
            raise ValueError(f"{cache} needs a network that is neither compiled nor wrapped")
        cache.check(network)
        self.network, self.cache = network, cache
        self._lock = threading.Lock()
        self._counts = CacheCounts()

    @property
    def counts(self) -> CacheCounts:
        """Calls within integrations so far, of all threads."""
        with self._lock:
            return self._counts

    def evaluate(
        self,
        call: Callable[[], Prediction],
        shape: torch.Size,
        level: Level,
        condition: BatchCondition | None,
    ) -> Prediction:
        """Evaluate the network, and reuse features where the cache permits it.

        Args:
            call: evaluates the denoiser of the network.
            shape: shape (B, *shape) of its input.
            level: level of the evaluation.
            condition: (B,) labels or `Conditions`, or None.

        Returns:
            The prediction.
        """
        integration = current_integration()
        if integration is None:
            return call()
        key = (self, integration.part)
        stream = integration.memory.get(key)
        if stream is not None and stream.shape == shape and are_equal(stream.condition, condition):
            memory = stream.memory
        else:
            memory = self._first_memory(integration)
        result = self.cache.evaluate(self.network, call, level, memory)
        integration.memory[key] = _Stream(shape, condition, result.memory)
        with self._lock:
            computed, reused = self._counts
            self._counts = CacheCounts(computed + (not result.is_reused), reused + result.is_reused)
        return result.prediction

    def _first_memory(self, integration: Integration) -> Any:
        """The memory of samples that have none; the first call of an integration prepares it."""
        if self not in integration.memory:
            prepared = self.cache.start(self.network, integration.plan)
            integration.memory[self] = integration.resources.enter_context(prepared)
        return integration.memory[self]
