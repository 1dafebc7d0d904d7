"""Batches of a fixed number of rows: queries of many trajectories in one call of the network.

A row is one sample under one condition at its own noise level. A network's output for a row has
the same bits whatever the other rows are, but not for every number of rows: libraries choose the
algorithms of convolutions and matrix products by it. A batch therefore always has the same number
of rows; its last row is repeated if there are too few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffcore.core.conditions import BatchCondition, as_conditions, concatenate
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction
from diffcore.guidance.reference import Query
from diffcore.schedules import Level
from diffcore.serving.trajectory import Trajectory

__all__ = ["Row", "evaluate_rows", "pending_rows"]


@dataclass(frozen=True, eq=False)
class Row:
    """A query of a trajectory, which is one row of a batch.

    Args:
        trajectory: trajectory that waits for the prediction.
        index: index of the query among those of the trajectory.
    """

    trajectory: Trajectory
    index: int

    @property
    def query(self) -> Query:
        """The network and the condition of the row."""
        return self.trajectory.queries[self.index]


def pending_rows(trajectory: Trajectory) -> list[Row]:
    """The rows that a trajectory needs for its next step.

    Returns:
        One row for each query.
    """
    return [Row(trajectory, index) for index in range(len(trajectory.queries))]


def evaluate_rows(rows: Sequence[Row], size: int) -> list[Prediction]:
    """Evaluate rows of one network in one call.

    Args:
        rows: rows of one network, `size` or fewer.
        size: number of rows of the call; the last row is repeated to fill it.

    Returns:
        The prediction (1, *shape) of each row.
    """
    padded = [*rows, *[rows[-1]] * (size - len(rows))]
    denoiser = rows[0].query.denoiser
    x = torch.cat([row.trajectory.x for row in padded])
    level = _stack_levels([row.trajectory.level for row in padded], x.ndim)
    prediction = denoiser(x, level, _concatenate_conditions(denoiser, padded, x.device))
    x0, eps = (value.split(1) for value in prediction)
    v = [None] * size if prediction.variance is None else prediction.variance.split(1)
    return [
        replace(prediction, x0=values[0], eps=values[1], variance=values[2])
        for values in zip(x0, eps, v, strict=True)
    ][: len(rows)]


def _stack_levels(levels: Sequence[Level], axes: int) -> Level:
    """One level for each row, float64 on the host, of shape (R, 1, ..., 1); ends alike."""
    values = torch.tensor(
        [(level.logsnr, level.t, level.alpha, level.sigma) for level in levels],
        dtype=torch.float64,
    )
    logsnr, t, alpha, sigma = values.T.reshape(4, -1, *[1] * (axes - 1))
    ends = [level.end for level in levels if level.end is not None]
    end = _stack_levels(ends, axes) if ends else None
    return Level(logsnr, t, alpha, sigma, levels[0].schedule, end)


def _concatenate_conditions(
    denoiser: DenoiserProtocol, rows: Sequence[Row], device: torch.device
) -> BatchCondition | None:
    """The conditions of all rows; a missing one becomes the absent value."""
    process = denoiser.process
    if not process.dropouts:
        return None
    given = (as_conditions(process, row.query.condition, 1, device) for row in rows)
    return concatenate([part.to(device) for part in given if part is not None])
