"""Knots that were tuned to one network, for one number of steps."""

from dataclasses import dataclass

from diffcore.schedules.base import Level, Schedule
from diffcore.schedules.grids import Explicit, Grid

__all__ = ["Tuned"]


@dataclass(frozen=True)
class Tuned(Grid):
    """Knots that `diffcore tune` found for one network, sampler, guidance and number of steps.

    For n steps the knots are at `logsnrs`, and for another number of steps those of `otherwise`.

    Args:
        logsnrs: n+1 values of λ = log α²/σ², strictly monotone; -inf is pure noise, inf is clean.
        otherwise: grid for numbers of steps other than n.
        sampler: sampler that the knots were tuned for, as text; no effect on the knots.
        guidance: guidance rule that they were tuned for, as text; no effect on the knots.

    Example:
        >>> from diffcore.schedules import Flow, Trailing
        >>> grid = Tuned((-4.0, 1.0, 3.0), otherwise=Trailing())
        >>> [len(grid.knots(Flow(), steps)) for steps in (2, 5)]
        [3, 6]
        >>> grid.knots(Flow(), 2)[1].logsnr
        1.0
    """

    logsnrs: tuple[float, ...]
    otherwise: Grid
    sampler: str = ""
    guidance: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "logsnrs", Explicit(self.logsnrs).logsnrs)

    @property
    def steps(self) -> int:
        """The number of steps n that the knots were tuned for."""
        return len(self.logsnrs) - 1

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        grid = Explicit(self.logsnrs) if steps == self.steps else self.otherwise
        return grid._levels(schedule, steps)
