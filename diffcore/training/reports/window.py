"""The steps since the last report: losses and gradient norms, kept on the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LossWindow", "NonFinite", "find_non_finite"]


class NonFinite(NamedTuple):
    """A step whose loss or gradient was not finite, and one of its samples.

    Args:
        step: optimizer step.
        batch_index: index of the sample in the global batch: the first with a loss that is not
            finite, else the one with the largest loss.
        loss: loss of that sample.
    """

    step: int
    batch_index: int
    loss: float


class LossWindow:
    """Losses and numbers of the steps since the last report; `gathered` alone reads them.

    Args:
        parts: number of micro-batches of a rank in a step.
        gather: gathers a tensor (1, ...) of each rank to (ranks, ...).
        group: number of consecutive samples of the global batch that are in one micro-batch.
        scalars: number of further numbers of each step, such as the gradient norm.
    """

    def __init__(
        self, parts: int, gather: Callable[[Tensor], Tensor], group: int = 1, scalars: int = 1
    ) -> None:
        self.parts, self.group, self.scalars = parts, group, scalars
        self.gather = gather
        self.rows: list[Tensor] = []
        self.past: Tensor | None = None

    def add(self, losses: Tensor, *scalars: Tensor) -> None:
        """Append a step.

        Args:
            losses: (samples,) losses of this rank, micro-batch after micro-batch.
            scalars: () numbers of the step.
        """
        self.rows.append(torch.cat([*(each.detach().float().view(1) for each in scalars), losses]))

    def gathered(self) -> Tensor:
        """The steps of the window, of all ranks. Every rank must call it.

        Returns:
            (steps, scalars + B) on the host: the means of the scalars over the ranks, then the
            losses in the order of the global batch (`DataOrder`).
        """
        past = torch.zeros(0, self.scalars) if self.past is None else self.past
        if not self.rows:
            return past
        rows = torch.stack(self.rows)
        ranks = self.gather(rows[None]).cpu()  # (ranks, steps, scalars + parts * micro)
        scalars = ranks[:, :, : self.scalars].double().mean(0).float()
        split = (self.parts, -1, self.group)
        losses = ranks[:, :, self.scalars :].unflatten(2, split).permute(1, 3, 2, 0, 4).flatten(1)
        table = torch.cat((scalars, losses), 1)
        self.past = table if self.past is None else torch.cat((past, table))
        self.rows = []
        return self.past

    def restore(self, past: Tensor | None) -> None:
        """Empty the window, and start with the steps that `gathered` returned earlier, if any."""
        self.rows, self.past = [], past if past is not None and len(past) else None


def find_non_finite(norms: Tensor, losses: Tensor, first: int) -> list[NonFinite]:
    """The steps of a window whose loss or gradient is not finite.

    Args:
        norms: (steps,) gradient norms.
        losses: (steps, B) losses.
        first: step of the first row.

    Returns:
        One entry for each such step, in order.
    """
    found = []
    for offset, (norm, row) in enumerate(zip(norms, losses, strict=True)):
        if not (norm.isfinite() and row.isfinite().all()):
            index = int(torch.where(row.isfinite(), row, torch.inf).argmax())
            found.append(NonFinite(first + offset, index, float(row[index])))
    return found
