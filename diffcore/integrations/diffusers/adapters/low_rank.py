"""The low-rank change of one layer's weight: applied to the weight, and extracted from two weights.

    W' = W + s (α / r) B A,   with DoRA   W' = m (W + s (α / r) B A) / ‖W + s (α / r) B A‖

A (r, in) is `down`, B (out, r) is `up`, s the strength. The norm is that of each output row. Hu et
al. 2021 (2106.09685); DoRA: Liu et al. 2024 (2402.09353).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffcore.integrations.diffusers.adapters.products import FullRank

__all__ = [
    "Adapter",
    "Change",
    "LowRank",
    "extract_low_rank",
    "merge_adapters",
]


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


Change = LowRank | FullRank
Adapter = Mapping[str, Change]
"""The changes of a model's layers, by the names of the layers."""


def _added(total: Tensor, change: Change, weight: Tensor, strength: float) -> Tensor:
    """A weight (out, in k k) with one more change of W; the norm of DoRA is that of W + s Δ."""
    delta = change.delta(strength)
    if delta.shape != total.shape:
        raise ValueError(
            f"the change has the shape {tuple(delta.shape)}, expected that of the weight, "
            f"{tuple(total.shape)}"
        )
    delta = delta.to(total.device)
    if change.magnitude is None:
        return total + delta
    norm = torch.linalg.vector_norm(weight + delta, dim=1, keepdim=True)
    return change.magnitude.float().view(-1, 1).to(total.device) * (total + delta) / norm


@torch.no_grad()
def merge_adapters(model: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Add adapters to the weights of a model, in place, as diffusers' `set_adapters` does.

        W_i = W_{i-1} + s_i Δ_i,   with DoRA   W_i = m_i (W_{i-1} + s_i Δ_i) / ‖W_0 + s_i Δ_i‖

    Args:
        model: model, such as the network or a text encoder of a pipeline.
        adapters: changes by the names of the model's layers, and the strength s of each adapter;
            1 is the adapter as it was trained.

    Raises:
        ValueError: the model has no layer of a name, or a layer of another shape.
    """
    layers = dict(model.named_modules())
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter):
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"the adapter changes {name}, which {type(model).__name__} has not: it belongs to "
                "another model"
            )
        total = base = weight.float().flatten(1)
        for adapter, strength in adapters:
            if name in adapter:
                try:
                    total = _added(total, adapter[name], base, strength)
                except ValueError as error:
                    raise ValueError(f"{name} of {type(model).__name__}: {error}") from None
        weight.copy_(total.view_as(weight))


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
