"""The denoiser that evaluates its network with a cache.

integrate(CachedDenoiser(denoiser, DeepCache(every=3)), ...)
"""

from torch import Tensor

from diffcore.caches.base import Cache
from diffcore.caches.cached_network import CacheCounts, CachedNetwork
from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["CachedDenoiser", "cached", "describe_reuse"]


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
        self.cache, self._cached = cache, CachedNetwork(inner.network, cache)

    @property
    def counts(self) -> CacheCounts:
        """Calls within integrations so far, of all threads."""
        return self._cached.counts

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        return self._cached.evaluate(
            lambda: self.inner(x, level, condition), x.shape, level, condition
        )


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
