"""The low-rank change of one layer's weight: applied to the weight, and extracted from two weights.

    W' = W + s (α / r) B A,   with DoRA   W' = m (W + s (α / r) B A) / ‖W + s (α / r) B A‖

A (r, in) is `down`, B (out, r) is `up`, s the strength. The norm is that of each output row. Hu et
al. 2021 (2106.09685); DoRA: Liu et al. 2024 (2402.09353).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Adapter", "LowRank", "extract_low_rank", "merge_adapter"]


class LowRank(NamedTuple):
    """The low-rank change of one weight.

    Args:
        down: (r, in), or (r, in, k, k) for a convolution.
        up: (out, r), or (out, r, 1, 1) for a convolution.
        alpha: α of the factor α / r.
        magnitude: (out,) norms m of the rows of the new weight (DoRA), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return len(self.down)

    def delta(self, strength: float = 1.0) -> Tensor:
        """The change s (α / r) B A.

        Args:
            strength: factor s.

        Returns:
            (out, in k k) change in float32.
        """
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return strength * self.alpha / self.rank * product

    def applied(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The changed weight.

        Args:
            weight: (out, in) or (out, in, k, k) weight W.
            strength: factor s of the change.

        Returns:
            W' in the shape and type of `weight`.

        Raises:
            ValueError: the change belongs to a weight of another shape.
        """
        delta = self.delta(strength)
        if delta.shape != weight.flatten(1).shape:
            raise ValueError(
                f"the change has the shape {tuple(delta.shape)}, expected that of the weight, "
                f"{tuple(weight.flatten(1).shape)}"
            )
        changed = weight.float().flatten(1) + delta.to(weight.device)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            changed = self.magnitude.float().view(-1, 1).to(weight.device) * changed / norm
        return changed.view_as(weight).to(weight.dtype)


Adapter = Mapping[str, LowRank]
"""The low-rank changes of a model's layers, by the names of the layers."""


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter, strength: float = 1.0) -> None:
    """Add an adapter to the weights of a model, in place.

    Args:
        model: model, such as the network or a text encoder of a pipeline.
        adapter: low-rank changes by the names of its layers.
        strength: factor s of the changes; 1 is the adapter as it was trained.

    Raises:
        ValueError: the model has no layer of a name, or a layer of another shape.
    """
    layers = dict(model.named_modules())
    for name, change in adapter.items():
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"the adapter changes {name}, which {type(model).__name__} has not: it belongs to "
                "another model"
            )
        try:
            weight.copy_(change.applied(weight, strength))
        except ValueError as error:
            raise ValueError(f"{name} of {type(model).__name__}: {error}") from None


def extract_low_rank(base: Tensor, tuned: Tensor, rank: int) -> tuple[LowRank, float]:
    """The change of rank r that is closest to the difference of two weights (truncated SVD).

    Args:
        base: (out, in) or (out, in, k, k) weight W.
        tuned: weight W' of the same shape.
        rank: r; a rank beyond that of the matrix is reduced to it.

    Returns:
        The change, with α = r, and its share of the squared norm of W' - W, within [0, 1].
    """
    difference = (tuned.double() - base.double()).flatten(1)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:rank], u[:, :rank] * root
    if base.ndim > 2:
        down, up = down.view(rank, *base.shape[1:]), up.view(*up.shape, 1, 1)
    total = float(s.square().sum())
    share = float(s[:rank].square().sum()) / total if total else 1.0
    return LowRank(down.float().contiguous(), up.float().contiguous(), float(rank)), share
