"""The contract of caches: which features of a network are reused at an evaluation.

At neighbouring noise levels the deep features of a network differ little. A cache computes them at
some evaluations, and reuses or extrapolates them at the others, which then cost a part of an
evaluation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from diffcore.caches.integration import LevelPlan
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level

__all__ = ["Cache", "CachedEvaluation"]


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

    def start(self, network: nn.Module, plan: LevelPlan) -> AbstractContextManager[Any]:
        """Prepare an integration; by default there is nothing to prepare.

        Args:
            network: the network.
            plan: lists the levels of the evaluations of the integration.

        Returns:
            A context manager, which is exited at the end of the integration, also after an error.
            It yields the memory at the first evaluation of samples under a condition.

        Raises:
            ValueError: the cache does not work with evaluations at these levels.
        """
        return nullcontext()

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
                that of `start` if there is none.

        Returns:
            The prediction, the new memory, and whether features were reused.
        """
