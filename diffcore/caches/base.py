"""The contract of caches, and the denoiser that evaluates a network with one.

    integrate(CachedDenoiser(denoiser, DeepCache(every=3)), ...)

At neighbouring noise levels the deep features of a network differ little. A cache computes them at
some evaluations, and reuses or extrapolates them at the others, which then cost a part of an
evaluation.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffcore.caches.integration import current_integration
from diffcore.core.conditions import BatchCondition, Conditions
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.network import unwrap
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["Cache", "CacheCounts", "CachedDenoiser", "CachedEvaluation", "cached", "describe_reuse"]


class CachedEvaluation(NamedTuple):
    """The result of an evaluation with a cache.

    Args:
        prediction: prediction of the denoiser.
        memory: what the cache keeps for the next evaluation.
        is_reused: whether features were reused.
    """

    prediction: Prediction
    memory: Any
    is_reused: bool


@dataclass(frozen=True)
class Cache(ABC):
    """A rule that decides which features of a network are reused at an evaluation.

    It is immutable; its memory is passed in and out, one for each integration.
    """

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Raise ValueError, with the remedy, if the network has no features that can be reused."""

    @abstractmethod
    def evaluate(
        self, network: nn.Module, call: Callable[[], Prediction], level: Level, memory: Any
    ) -> CachedEvaluation:
        """Evaluate the network, and reuse features of the memory where the rule permits it.

        Args:
            network: the network.
            call: evaluates the denoiser of the network at `level`.
            level: level of the evaluation.
            memory: memory after the last evaluation of the same samples under the same conditions;
                None if there is none.

        Returns:
            The prediction, the new memory, and whether features were reused.
        """


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


class CachedDenoiser(DenoiserWrapper):
    """A denoiser whose network is evaluated with a cache.

    What is kept belongs to one integration and to samples under one condition: at a call of another
    number of rows or other conditions, as where guidance begins, all features are computed.
    Evaluations outside of `integrate` are those of the whole network.

    Args:
        inner: denoiser of a network, which must not be compiled.
        cache: rule that decides what is reused.

    Raises:
        ValueError: the network has no features that the cache can reuse, or is compiled.
    """

    def __init__(self, inner: DenoiserProtocol, cache: Cache) -> None:
        super().__init__(inner)
        if inner.network is None:
            raise ValueError(f"{cache} needs a network with layers, and the denoiser has none")
        if any(module._compiled_call_impl is not None for module in inner.network.modules()) or (
            unwrap(inner.network) is not inner.network
        ):
            raise ValueError(f"{cache} needs a network that is neither compiled nor wrapped")
        cache.check(inner.network)
        self.cache, self._network = cache, inner.network
        self._lock = threading.Lock()
        self._counts = CacheCounts()

    @property
    def counts(self) -> CacheCounts:
        """Calls within integrations so far, of all threads."""
        with self._lock:
            return self._counts

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        integration = current_integration()
        if integration is None:
            return self.inner(x, level, condition)
        key = (self, integration.part)
        stream = integration.memory.get(key)
        memory = None
        if stream is not None and stream.shape == x.shape:
            memory = stream.memory if _is_same(stream.condition, condition) else None
        result = self.cache.evaluate(
            self._network, lambda: self.inner(x, level, condition), level, memory
        )
        integration.memory[key] = _Stream(x.shape, condition, result.memory)
        with self._lock:
            computed, reused = self._counts
            self._counts = CacheCounts(computed + (not result.is_reused), reused + result.is_reused)
        return result.prediction


def cached(denoiser: DenoiserProtocol, cache: Cache | None) -> DenoiserProtocol:
    """A denoiser whose network is evaluated with a cache.

    Args:
        denoiser: denoiser of a network.
        cache: rule that decides what is reused; None: the denoiser itself is returned.

    Returns:
        The denoiser.

    Raises:
        ValueError: as `CachedDenoiser`.

    Example:
        sample(cached(Run("runs/digits").denoiser(), DeepCache(every=3)), seeds=range(16))
    """
    return denoiser if cache is None else CachedDenoiser(denoiser, cache)


def describe_reuse(denoiser: DenoiserProtocol) -> str:
    """The share of the calls of a network that reused features, as a part of a line.

    Returns:
        Text that begins with a comma; empty for a denoiser without a cache.
    """
    if not isinstance(denoiser, CachedDenoiser):
        return ""
    return f", {denoiser.counts.reused_share:.0%} with features of {denoiser.cache}"


def _is_same(a: BatchCondition | None, b: BatchCondition | None) -> bool:
    """Whether two conditions of as many samples are equal; on an accelerator, it is waited for."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if not (isinstance(a, Conditions) and isinstance(b, Conditions)):
        return False
    if a.values.keys() != b.values.keys() or not _is_same(a.label, b.label):
        return False
    return all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in ((a.values, b.values), (a.absent, b.absent))
        for name in ours
    )
