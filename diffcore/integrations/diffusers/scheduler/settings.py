"""The components of a DiffcoreScheduler, which its config holds as plain data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process, TimeConditioning
from diffcore.samplers import Sampler
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Grid, Level, Schedule, Shifted

__all__ = ["SchedulerSettings", "apply_dynamic_shift"]

VarianceOption = Literal["fixed", "learned_range"]


@dataclass(frozen=True)
class SchedulerSettings:
    """Process, sampler and grid of a scheduler.

    Args:
        sampler: numerical integrator; not an adaptive one.
        grid: rule that places the knots.
        schedule: noise schedule of training.
        prediction_type: output of the network.
        time: time conditioning of the network.
        sigma_data: standard deviation of x_0, for edm and for the scale of the first x.
        last: λ of the last knot; None for clean data. Stable Diffusion ends at index 0 of its
            table.
        clip: bound to which |x_0| is clamped, and ε follows; None does not clamp.
        levels: λ of further knots, such as the bounds of a guidance interval.
        variance_type: learned_range if the output of the network has 2C channels of which the
            second half is 2v - 1 (`Process.variance`), else fixed.
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
    variance_type: VarianceOption = "fixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.sampler.is_adaptive:
            raise ValueError(
                f"{self.sampler} is adaptive, and a pipeline needs the levels beforehand: use "
                "another sampler"
            )
        if self.last is not None and not math.isfinite(self.last):
            raise ValueError(
                f"last is {self.last}, expected a finite λ, or None for the clean level"
            )
        if self.variance_type not in get_args(VarianceOption):
            raise ValueError(
                f"variance_type is {self.variance_type!r}, expected fixed or learned_range; the "
                "sampler DDPM(variance) chooses between fixed variances"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is {self.clip}, expected a positive bound on x_0, or None")
        self.process  # raises if the fields contradict each other

    @property
    def process(self) -> Process:
        """The process that the network was trained on; its shape is a placeholder."""
        return Process(
            self.schedule,
            self.prediction_type,
            self.time,
            shape=(1,),
            sigma_data=self.sigma_data,
            variance="fixed" if self.variance_type == "fixed" else "learned",
        )

    def knots(self, steps: int) -> tuple[Level, ...]:
        """The knots of the grid for a number of steps."""
        return self.complete_knots(self.grid.knots(self.schedule, steps))

    def complete_knots(self, knots: tuple[Level, ...]) -> tuple[Level, ...]:
        """Insert the knots at `levels`, and replace the clean knot by that at `last`.

        Args:
            knots: knots of a grid.

        Returns:
            The knots of sampling. The clean knot stays if the knot before it is cleaner than
            `last`.
        """
        knots = insert_levels(knots, self.levels)
        if self.last is None or knots[-1].logsnr < math.inf or not knots[-2].logsnr < self.last:
            return knots
        return (*knots[:-1], self.schedule.at(self.last))


def apply_dynamic_shift(
    settings: SchedulerSettings, config: Mapping[str, Any], mu: float | None
) -> SchedulerSettings:
    """Shift the schedule in time by s = e^μ (exponential) or s = μ (linear).

    Args:
        settings: settings before the shift.
        config: config with `use_dynamic_shifting` and `time_shift_type`.
        mu: μ, which the pipeline computes from the image size.

    Returns:
        The shifted settings; the same settings without `use_dynamic_shifting`.

    Raises:
        ValueError: μ is missing, or a linear shift is not positive.
    """
    if not config.get("use_dynamic_shifting"):
        return settings
    if mu is None:
        raise ValueError(
            "use_dynamic_shifting is set: pass mu, the μ that the pipeline computes from the "
            "image's size"
        )
    is_linear = config.get("time_shift_type") == "linear"
    if is_linear and not mu > 0:
        raise ValueError(f"mu is {mu}, expected a time shift above 0")
    log_shift = math.log(mu) if is_linear else mu
    return replace(settings, schedule=Shifted(settings.schedule, -2 * log_shift))
