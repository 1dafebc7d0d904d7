"""The deep part of a network: what a cache reuses, and what is computed at each evaluation.

U-Net          the levels below the first `depth`, of both arms, and the middle block; the
               feature is the output of the last deep block of the upward arm
transformer    the blocks after the first `depth`; the feature is the difference between the
               output and the input of them all
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffcore.caches.forwards import Replacement
from diffcore.core.network import class_name, find_blocks

__all__ = ["Blocks", "DeepPart", "Levels", "find_deep_part"]


class DeepPart(ABC):
    """The deep part of a network in one evaluation."""

    feature: Tensor | None = None
    """The feature, once the deep part is computed."""

    @abstractmethod
    def computing(self) -> Mapping[nn.Module, Replacement]:
        """Replacements that compute the deep part and record its feature.

        Returns:
            Module -> replacement of its forward.
        """

    @abstractmethod
    def reusing(self, feature: Tensor, before: "DeepPart") -> Mapping[nn.Module, Replacement]:
        """Replacements that put a feature in the place of the deep part.

        Args:
            feature: the feature.
            before: a deep part that was computed, whose outputs have the same shapes.

        Returns:
            Module -> replacement of its forward.
        """


class Levels(DeepPart):
    """The deep levels of a U-Net with `down_blocks`, `mid_block` and `up_blocks`.

    Args:
        network: the U-Net.
        depth: number of levels that are always computed.
    """

    def __init__(self, network: Any, depth: int) -> None:
        self._blocks: list[nn.Module] = [
            *network.down_blocks[depth:],
            *([network.mid_block] if network.mid_block is not None else []),
            *network.up_blocks[: len(network.up_blocks) - depth],
        ]
        self._outputs: dict[nn.Module, Any] = {}

    def computing(self) -> Mapping[nn.Module, Replacement]:
        return {block: self._record(block) for block in self._blocks}

    def _record(self, block: nn.Module) -> Replacement:
        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._outputs[block] = output = original(*args, **kwargs)
            if block is self._blocks[-1]:
                self.feature = output
            return output

        return forward

    def reusing(self, feature: Tensor, before: DeepPart) -> Mapping[nn.Module, Replacement]:
        assert isinstance(before, Levels)
        # Only the last output is read by what is computed; the others have the right number.
        outputs = before._outputs | {self._blocks[-1]: feature}
        return {block: _constant(outputs[block]) for block in self._blocks}


class Blocks(DeepPart):
    """The deep blocks of a transformer, each of which maps tokens to tokens of the same shape.

    Args:
        network: the transformer.
        depth: number of blocks that are always computed.
    """

    def __init__(self, network: nn.Module, depth: int) -> None:
        blocks = [*find_blocks(network).values()]
        self.before, self.blocks = blocks[depth - 1], blocks[depth:]
        self._start: Tensor | None = None

    def computing(self) -> Mapping[nn.Module, Replacement]:
        return {self.blocks[0]: self._first} | {self.blocks[-1]: self._last}

    def _first(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._start = hidden_states(args, kwargs)
        return original(*args, **kwargs)

    def _last(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        output = require_tokens(original(*args, **kwargs), self.blocks[-1])
        assert self._start is not None  # the first block comes before
        self.feature = output - self._start
        return output

    def reusing(self, feature: Tensor, before: DeepPart) -> Mapping[nn.Module, Replacement]:
        def add(original: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states(args, kwargs) + feature

        def keep(original: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states(args, kwargs)

        return dict.fromkeys(self.blocks, keep) | {self.blocks[-1]: add}


def _constant(output: Any) -> Replacement:
    return lambda original, *args, **kwargs: output


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tokens among the arguments of a block: the first one.

    Returns:
        Tokens (B, N, C).
    """
    return args[0] if args else kwargs["hidden_states"]


def require_tokens(output: Any, block: nn.Module) -> Tensor:
    """The output of a block, if it is a tensor.

    Returns:
        Tokens (B, N, C).

    Raises:
        ValueError: it is not; the message has the remedy.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"a block {class_name(block)} returns {type(output).__name__}, and a cache needs one "
            "that returns a tensor: sample without it, or use a cache of diffusers in its pipeline"
        )
    return output


def find_deep_part(network: nn.Module, depth: int, rule: object) -> DeepPart:
    """Find the deep part of a network.

    Args:
        network: the network, which may contain the U-Net.
        depth: number of levels or blocks that are always computed.
        rule: the cache, which begins the message.

    Returns:
        The deep part, for one evaluation.

    Raises:
        ValueError: there is none below this depth.
    """
    for module in network.modules():
        arms = (getattr(module, "down_blocks", None), getattr(module, "up_blocks", None))
        if all(isinstance(arm, nn.ModuleList) for arm in arms):
            if len(arms[0] or ()) != len(arms[1] or ()) or len(arms[0] or ()) <= depth:
                raise ValueError(
                    f"{rule} computes {depth} levels, and the network {class_name(module)} has "
                    f"{len(arms[0] or ())}, of which one must remain: lower depth"
                )
            return Levels(module, depth)
    count = len(find_blocks(network))
    if count <= depth + 1:
        raise ValueError(
            f"{rule} computes {depth} blocks, and the network {class_name(network)} has {count}, "
            "of which two must remain: lower depth, or sample without a cache"
        )
    return Blocks(network, depth)
