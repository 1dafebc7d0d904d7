"""Features of past evaluations, and their extrapolation to another noise level."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcore.schedules import Level
from diffcore.schedules.base import Real

__all__ = ["Features", "require_one_level"]


@dataclass(frozen=True)
class Features:
    """Features F of the last evaluations that computed them, the latest first.

    The value at another level is that of the polynomial of degree d through the last d + 1 of them,
    over a = σ/(α+σ), which is finite at pure noise and at clean data:

        F(a) ≈ Σ_i F(a_i) Π_{j≠i} (a - a_j) / (a_i - a_j)

    Degree 0 is the latest value.

    Args:
        values: pairs of a and F.
    """

    values: tuple[tuple[float, Tensor], ...] = ()

    def add(self, level: Level, value: Tensor, degree: int) -> "Features":
        """The features with a further value, of which those that degree d needs are kept.

        Returns:
            The features, the further value first.
        """
        a = require_one_level(level.blend)
        kept = tuple((b, old) for b, old in self.values if b != a)[:degree]
        return Features(((a, value), *kept))

    def at(self, level: Level) -> Tensor:
        """The extrapolated value at a level.

        Returns:
            F, of the shape of the values.
        """
        a, nodes = require_one_level(level.blend), [b for b, _ in self.values]
        total: Any = 0.0
        for i, (node, value) in enumerate(self.values):
            weight = 1.0
            for j, other in enumerate(nodes):
                weight *= (a - other) / (node - other) if j != i else 1.0
            total = total + weight * value
        return total if len(nodes) > 1 else self.values[0][1]


def require_one_level(value: Real) -> float:
    """A value of a level that is the same for the whole batch.

    Returns:
        The value.

    Raises:
        TypeError: the level is a map.
    """
    if not isinstance(value, float):
        raise TypeError("a cache needs one level for the whole batch: sample without a cache")
    return value
