"""DeepCache: deep features are computed at every few evaluations, and extrapolated between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from diffcore.caches.base import Cache, CachedEvaluation
from diffcore.caches.deep_part import DeepPart, find_deep_part
from diffcore.caches.features import Features, require_one_level
from diffcore.caches.forwards import replace_forwards
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["DeepCache", "DeepCacheMemory"]


class DeepCacheMemory(NamedTuple):
    """Memory of DeepCache.

    Args:
        part: deep part at the last evaluation that computed it.
        features: features of the last evaluations that computed them.
        logsnr: λ of the last of them.
        reused: number of evaluations since then.
    """

    part: DeepPart
    features: Features
    logsnr: float
    reused: int = 0


@dataclass(frozen=True)
class DeepCache(Cache):
    """DeepCache computes the deep part of a network at every N-th evaluation.

        evaluations 0, N, 2N, ...   the whole network
        others                      the first `depth` levels or blocks, and the extrapolated feature

    In a U-Net the deep part are the levels below the first, whose cost is most of the network (Ma
    et al. 2023, 2312.00858, at the granularity of blocks). In a transformer they are the blocks
    after the first, of which the sum of the residuals is reused (Chen et al. 2024, Δ-DiT,
    2406.01125). With `order` above 0 the feature is extrapolated by the polynomial through its last
    values over σ/(α+σ), for any grid. TaylorSeer (Liu et al. 2025, 2503.06923) does so over steps,
    by backward differences: the same at order 1 and uniform steps. The decision needs no data, so a
    sample does not depend on the others of its batch.

    Args:
        every: N ≥ 1, number of evaluations from one computed feature to the next; 1 reuses nothing.
        order: degree of the polynomial that extrapolates the feature; 0 takes its last value.
        depth: number of levels of a U-Net, or of blocks of a transformer, that are computed at each
            evaluation, at least 1.
        span: change of λ since the last computed feature beyond which it is computed again before
            its turn; inf for no bound.
    """

    every: int = 3
    order: int = 0
    depth: int = 1
    span: float = math.inf

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}, expected at least 1 evaluation")
        if not 0 <= self.order <= 3:
            raise ValueError(f"order is {self.order}, expected a degree from 0 to 3")
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected at least 1 level or block")
        if not self.span > 0:
            raise ValueError(f"span is {self.span}, expected a change of λ above 0, or inf")

    def check(self, network: nn.Module) -> None:
        find_deep_part(network, self.depth, self)

    def evaluate(
        self,
        network: nn.Module,
        call: Callable[[], Prediction],
        level: Level,
        memory: DeepCacheMemory | None,
    ) -> CachedEvaluation:
        part, logsnr = find_deep_part(network, self.depth, self), require_one_level(level.logsnr)
        if memory is not None and self._is_near(memory, logsnr):
            with replace_forwards(part.reusing(memory.features.at(level), memory.part)):
                prediction = call()
            return CachedEvaluation(prediction, memory._replace(reused=memory.reused + 1), True)
        with replace_forwards(part.computing()):
            prediction = call()
        assert part.feature is not None  # it was computed
        features = Features() if memory is None else memory.features
        features = features.add(level, part.feature, self.order)
        return CachedEvaluation(prediction, DeepCacheMemory(part, features, logsnr), False)

    def _is_near(self, memory: DeepCacheMemory, logsnr: float) -> bool:
        if memory.reused + 1 >= self.every:
            return False
        return self.span == math.inf or abs(logsnr - memory.logsnr) <= self.span
