"""Changes of full rank that are stored as products of small matrices: LoHa and LoKr.

    LoHa   (α / r) (A₁ B₁) ∘ (A₂ B₂)      Hyeon-Woo et al. 2021 (2108.06098)
    LoKr   (α / r) C ⊗ D                  Yeh et al. 2023 (2309.14859)

C and D are matrices, or products of two. The names of the tensors are those of LyCORIS and peft.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PRODUCT_TENSORS", "FullRank", "multiply"]

PRODUCT_TENSORS = (
    *(f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"),
    *(f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")),
)
"""Last words of the names of the tensors of a product."""


class FullRank(NamedTuple):
    """The change of one weight as a matrix.

    Args:
        matrix: (out, in), or (out, in k k) for a convolution.
    """

    matrix: Tensor
    magnitude: None = None

    def delta(self, strength: float = 1.0) -> Tensor:
        """The change s M.

        Args:
            strength: factor s.

        Returns:
            (out, in k k) change in float32.
        """
        return strength * self.matrix.float()


def multiply(entry: Mapping[str, Tensor], alpha: Callable[[int], float]) -> FullRank | None:
    """Multiply out the product of an entry of a file.

    Args:
        entry: tensors by the last words of their names (`PRODUCT_TENSORS`).
        alpha: function of the rank r that returns α.

    Returns:
        The change; None if tensors are missing or do not fit each other.
    """
    try:
        if "hada_w1_a" in entry:
            left, right = (entry[f"hada_w{i}_a"] @ entry[f"hada_w{i}_b"] for i in (1, 2))
            rank = len(entry["hada_w1_b"])
            return FullRank(alpha(rank) / rank * (left * right).float())
        factors = [_factor(entry, f"lokr_w{i}") for i in (1, 2)]
        ranks = [len(entry[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in entry]
        # Without a factor of low rank LyCORIS has no rank, and does not scale.
        scale = alpha(ranks[0]) / ranks[0] if ranks else alpha(0)
        left, right = (factor.float() for factor in factors)
        left = left.view(*left.shape, *[1] * (right.ndim - 2))
        return FullRank(scale * torch.kron(left, right.contiguous()).flatten(1))
    except (KeyError, RuntimeError):
        return None


def _factor(entry: Mapping[str, Tensor], name: str) -> Tensor:
    return entry[name] if name in entry else entry[f"{name}_a"] @ entry[f"{name}_b"]
