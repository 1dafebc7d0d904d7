"""First-block cache: the change of the first block's residual decides whether the others run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffcore.caches.base import Cache, CachedEvaluation
from diffcore.caches.deep_part import Blocks, find_deep_part, hidden_states, require_tokens
from diffcore.caches.features import Features
from diffcore.caches.forwards import Replacement, replace_forwards
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["FirstBlockCache", "FirstBlockMemory"]


class FirstBlockMemory(NamedTuple):
    """Memory of FirstBlockCache.

    Args:
        features: residuals of the deep blocks at the last evaluations that computed them.
        residual: residual of the first block that later ones are compared with.
        change: sum of its changes since the deep blocks were computed, if they are accumulated.
    """

    features: Features
    residual: Tensor
    change: float = 0.0


@dataclass(frozen=True)
class FirstBlockCache(Cache):
    """First-block cache reuses the deep blocks of a transformer while the first one changes little.

        ‖r - r'‖₁ / ‖r'‖₁ < threshold,   r = first block's output - its input

    r' is the residual at the last evaluation that computed all blocks (ParaAttention's first-block
    cache, as diffusers' FirstBlockCacheConfig). With `accumulate`, r' is that of the last
    evaluation, and the changes since all blocks were computed are summed. Only this sum is that of
    TeaCache (Liu et al. 2024, 2411.19108), which compares the modulated input of the first block
    in place of its residual, and maps each change by a polynomial that is fitted to the model.

    The norms are those of the whole batch, as in diffusers, so the decision depends on the other
    samples: use `batch_size` 1 where a sample must be a function of its seed alone. Each evaluation
    reads one number from the device.

    Args:
        threshold: relative change below which the deep blocks are not computed, above 0.
        accumulate: whether changes are summed from evaluation to evaluation.
        order: degree of the polynomial that extrapolates the residual of the deep blocks; 0 takes
            its last value.
    """

    threshold: float = 0.1
    accumulate: bool = False
    order: int = 0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold is {self.threshold}, expected a relative change above 0")
        if not 0 <= self.order <= 3:
            raise ValueError(f"order is {self.order}, expected a degree from 0 to 3")

    def check(self, network: nn.Module) -> None:
        if not isinstance(find_deep_part(network, 1, self), Blocks):
            raise ValueError(
                f"{self} needs a transformer, and the network is a U-Net: use DeepCache"
            )

    def evaluate(
        self,
        network: nn.Module,
        call: Callable[[], Prediction],
        level: Level,
        memory: FirstBlockMemory | None,
    ) -> CachedEvaluation:
        first = _FirstBlock(self, network, level, memory)
        with replace_forwards(first.replacements()):
            prediction = call()
        return CachedEvaluation(prediction, first.next_memory(), first.is_reused)


class _FirstBlock:
    """One evaluation, in which the first block decides about the others.

    Args:
        rule: the cache.
        network: the network.
        level: level of the evaluation.
        memory: memory after the last evaluation.
    """

    def __init__(
        self,
        rule: FirstBlockCache,
        network: nn.Module,
        level: Level,
        memory: FirstBlockMemory | None,
    ) -> None:
        self.rule, self.level, self.memory = rule, level, memory
        self.is_reused, self.change = False, 0.0
        self.residual: Tensor | None = None
        part = find_deep_part(network, 1, rule)
        assert isinstance(part, Blocks)  # `check` refuses a U-Net
        self._part: Blocks = part
        self._block = self._part.before
        self._computing = self._part.computing()
        self._reusing: Mapping[nn.Module, Replacement] = {}

    def replacements(self) -> Mapping[nn.Module, Replacement]:
        """Replacements of all blocks; those of the deep ones follow the decision of the first."""
        return {block: self._deep(block) for block in self._part.blocks} | {
            self._block: self._decide
        }

    def _decide(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        output = require_tokens(original(*args, **kwargs), self._block)
        self.residual = output - hidden_states(args, kwargs)
        if self.memory is not None:
            before = self.memory.residual
            relative = (self.residual - before).abs().mean() / before.abs().mean()
            self.change = self.memory.change + float(relative)
            self.is_reused = self.change < self.rule.threshold
            if self.is_reused:
                feature = self.memory.features.at(self.level)
                self._reusing = self._part.reusing(feature, self._part)
        return output

    def _deep(self, block: nn.Module) -> Replacement:
        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = self._reusing if self.is_reused else self._computing
            replacement = chosen.get(block)
            if replacement is None:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        return forward

    def next_memory(self) -> FirstBlockMemory:
        """The memory after this evaluation."""
        assert self.residual is not None  # the first block was evaluated
        if not self.is_reused:
            assert self._part.feature is not None  # it was computed
            features = Features() if self.memory is None else self.memory.features
            features = features.add(self.level, self._part.feature, self.rule.order)
            return FirstBlockMemory(features, self.residual)
        assert self.memory is not None  # without it nothing is reused
        if self.rule.accumulate:
            return self.memory._replace(residual=self.residual, change=self.change)
        return self.memory
