"""The knots of a call of `set_timesteps`: from its arguments, or from the grid."""

import math
from functools import lru_cache

import numpy as np

from diffcore.integrations.diffusers.scheduler.call import CallPlan
from diffcore.integrations.diffusers.scheduler.scheduler_grid import SchedulerGrid
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.schedules import Explicit, Level

__all__ = ["call_plan"]

TERMINAL_TOLERANCE = 1e-3
"""A first knot that exceeds the terminal level by less than this in λ is replaced by it: published
σ/α are rounded.
"""
Numbers = tuple[float, ...]


@lru_cache(32)
def call_plan(
    settings: SchedulerSettings,
    steps: int | None,
    timesteps: Numbers | None,
    sigmas: Numbers | None,
) -> CallPlan:
    """The plan of a call, cached for equal calls.

    Args:
        settings: settings of the scheduler, with the shift of the call.
        steps: number of steps of the grid, or None.
        timesteps: time input at each knot, which replaces the grid, or None.
        sigmas: σ/α at each knot, which replaces the grid (for a flow: the time t before its shift),
            or None.

    Returns:
        The plan.

    Raises:
        ValueError: The arguments define no knots or contradict each other, or the sampler or the
            network cannot be evaluated at them.
    """
    return CallPlan.of(
        settings.process,
        settings.sampler,
        _knots(settings, steps, timesteps, sigmas),
        settings.levels,
    )


def _knots(
    settings: SchedulerSettings,
    steps: int | None,
    timesteps: Numbers | None,
    sigmas: Numbers | None,
) -> tuple[Level, ...]:
    schedule = settings.schedule
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas were given: pass one of them")
    if timesteps is not None:
        return _explicit_knots(settings, [settings.time.level(schedule, t) for t in timesteps])
    if sigmas is None:
        if steps is None:
            raise ValueError("num_inference_steps is missing: pass it, timesteps or sigmas")
        return settings.knots(steps)
    if settings.time.variable != "blend":
        return _explicit_knots(
            settings, [schedule.at(-2 * math.log(sigma)) for sigma in sigmas if sigma > 0]
        )
    if isinstance(settings.grid, SchedulerGrid):
        return settings.complete_knots(settings.grid.knots_of(schedule, sigmas))
    # Flow pipelines pass this default when the user gives only a number of steps.
    if np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas))):
        return settings.knots(len(sigmas))
    return _explicit_knots(settings, [schedule.level(sigma) for sigma in sigmas if sigma > 0])


def _explicit_knots(settings: SchedulerSettings, levels: list[Level]) -> tuple[Level, ...]:
    lowest = settings.schedule.logsnr(1.0)
    logsnrs = [float(level.logsnr) for level in levels]
    if logsnrs and lowest - TERMINAL_TOLERANCE < logsnrs[0] < lowest:
        logsnrs[0] = lowest
    grid = Explicit((*logsnrs, math.inf))
    return settings.complete_knots(grid.knots(settings.schedule, len(logsnrs)))
