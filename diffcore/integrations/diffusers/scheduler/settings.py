"""What a DiffcoreScheduler's config holds: components of ours, as the specs that JSON keeps."""

import math
from dataclasses import dataclass, replace
from typing import Any

from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process, TimeConditioning
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import Sampler
from diffcore.sampling.generation import insert_levels
from diffcore.schedules import Grid, Level, Schedule, Shifted


@dataclass(frozen=True)
class Settings:
    """How a pipeline's network is asked, and what of ours integrates it.

    Args:
        sampler: the integrator; not one that decides from the samples where to ask.
        grid: which levels it visits.
        schedule: the noise levels of training.
        prediction_type: what the network outputs.
        time: how it is told the level.
        sigma_data: standard deviation of x_0, for edm and for the first sample's scale.
        last: λ of the last knot where a run does not end at the clean level; Stable Diffusion's is that of index 0.
        clip: x_0 is clamped to ±clip, and ε follows.
        levels: λ that are knots beside the grid's, such as the bounds of a guidance interval.
    """

    sampler: Sampler
    grid: Grid
    schedule: Schedule
    prediction_type: PredictionType
    time: TimeConditioning
    sigma_data: float = 1.0
    last: float | None = None
    clip: float | None = None
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.sampler.is_adaptive:
            raise ValueError(
                f"{self.sampler} decides as it goes where to ask, and a pipeline must know before: use another"
            )
        if self.last is not None and not math.isfinite(self.last):
            raise ValueError(
                f"last is {self.last}, expected a finite λ, or None for the clean level"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is {self.clip}, expected a positive bound on x_0, or None")
        self.process  # refuses fields that contradict each other

    @property
    def process(self) -> Process:
        """The process, of samples of any shape."""
        return Process(
            self.schedule, self.prediction_type, self.time, shape=(1,), sigma_data=self.sigma_data
        )

    def shifted(self, mu: float, kind: str) -> "Settings":
        """The settings for one size of image: time shifted by s = e^μ (exponential) or s = μ (linear)."""
        if kind == "linear" and not mu > 0:
            raise ValueError(f"mu is {mu}, expected a time shift above 0")
        return replace(
            self,
            schedule=Shifted(self.schedule, -2 * (mu if kind == "exponential" else math.log(mu))),
        )

    def knots(self, steps: int) -> tuple[Level, ...]:
        """Those of the grid."""
        return self.ended(self.grid.knots(self.schedule, steps))

    def ended(self, knots: tuple[Level, ...]) -> tuple[Level, ...]:
        """The knots with `levels` among them, and `last` in place of the clean one unless the one before it is as clean."""
        knots = insert_levels(knots, self.levels)
        if self.last is None or knots[-1].logsnr < math.inf or not knots[-2].logsnr < self.last:
            return knots
        return (*knots[:-1], self.schedule.at(self.last))

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "Settings":
        """From components, or their specs."""
        return from_spec(cls, {name: to_spec(value) for name, value in fields.items()})
