"""The random numbers of a training step, and the key that determines them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple
from zlib import crc32

from torch import Tensor

from diffcore.core.random import Stream, derive_seed, uniform
from diffcore.schedules import Level

__all__ = ["Draw", "SampleKey", "condition_mask"]


@dataclass(frozen=True)
class SampleKey:
    """The position of samples in a training run: the key of all their random numbers.

    Args:
        seed: 64-bit seed of the run.
        step: number of the optimizer step.
        index: index of each sample in the step's global batch, an int64 host tensor (B,).
        batch: size of the global batch, the sum over ranks and accumulation.
    """

    seed: int
    step: int
    index: Tensor
    batch: int

    @property
    def position(self) -> Tensor:
        """The index of each sample in the whole run, of shape (B,)."""
        return self.step * self.batch + self.index


class Draw(NamedTuple):
    """The random numbers of a training step.

    Args:
        level: noise levels on the host: one per sample, or a map of levels of the shape of x_0.
        noise: ε (B, *shape), which the network's target contains.
        dropout_mask: True (B,) for samples whose label is replaced by the null label.
        importance: factor (B,) of the loss, float64 on the host: 1 over the density of the draw if
            the objective is corrected for it.
        perturbation: further noise (B, *shape) in x that the target lacks (DDPM-IP); None for none.
        condition_masks: name of a condition -> True (B,) for samples without it.
        key: key of the samples, from which an objective derives further random numbers.
        conditions: name of a condition -> its values (B, *shape), which the trainer puts in place
            of those of the data.
    """

    level: Level
    noise: Tensor
    dropout_mask: Tensor
    importance: Tensor
    perturbation: Tensor | None = None
    condition_masks: Mapping[str, Tensor] = MappingProxyType({})
    key: SampleKey | None = None
    conditions: Mapping[str, Tensor] = MappingProxyType({})

    def paired(self, noise: Tensor | None) -> "Draw":
        """The draw with the noise that the data pairs with x_0.

        Args:
            noise: ε (B, *shape) of the samples, on any device; None: the data pairs none.

        Returns:
            The draw with this noise, or the draw itself.
        """
        if noise is None:
            return self
        return self._replace(noise=noise.to(self.noise, non_blocking=True))


def condition_mask(key: SampleKey, name: str, dropout: float) -> Tensor:
    """True (B,) for samples without a condition, independent of the other conditions.

    Args:
        key: position of the samples in the run.
        name: name of the condition.
        dropout: share of the samples without it.
    """
    own = derive_seed(key.seed, Stream.CONDITION, crc32(name.encode()))
    return uniform(own, Stream.CONDITION, key.position)[:, 0] < dropout
