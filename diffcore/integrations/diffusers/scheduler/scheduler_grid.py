"""The grid of a diffusers scheduler: the knots of its own `set_timesteps`."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np

from diffcore.core.process import TimeConditioning
from diffcore.schedules import (
    Grid,
    Karras,
    Leading,
    Level,
    Linspace,
    Schedule,
    Trailing,
    UniformLogSNR,
)
from diffcore.schedules.diffusers_config import FLOWS

__all__ = ["SchedulerGrid", "grid_from_config"]

ROUNDING = 2e-3
"""Two levels that differ by less in λ are equal: the levels of diffusers are float32."""
COMPARED_STEPS = (4, 7, 30)
"""Numbers of steps at which a grid is compared with the scheduler's list."""
LEVEL_OPTIONS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "sigma_schedule",
)
"""Options that replace the timesteps of a table by values of σ/α."""
OTHER_GRID = "pass another grid, such as grid=Trailing()"


@dataclass(frozen=True)
class SchedulerGrid(Grid):
    """The list of timesteps or sigmas of a diffusers scheduler, then a clean knot.

    `DiffcoreScheduler.from_config` chooses it where no other grid gives the list.

    Args:
        scheduler: name of the scheduler's class in diffusers.
        options: pairs (name, value) of its config, where they differ from the defaults.
    """

    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        cls = getattr(diffusers, self.scheduler, None)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
            raise ValueError(
                f"scheduler is {self.scheduler!r}, expected one of diffusers: {OTHER_GRID}"
            )
        object.__setattr__(self, "options", _hashable(self.options))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "SchedulerGrid":
        """The grid of a scheduler's config.

        Args:
            config: config with `_class_name`.

        Returns:
            The grid.

        Raises:
            ValueError: diffusers has no scheduler of this name.
        """
        name = str(config.get("_class_name"))
        kind = getattr(diffusers, name, None)
        parameters = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
        options = {
            key: value
            for key, value in config.items()
            if key in parameters and value != parameters[key].default
        }
        return cls(name, tuple(options.items()))

    def knots_of(self, schedule: Schedule, sigmas: Sequence[float]) -> tuple[Level, ...]:
        """The knots for the `sigmas` that a pipeline passes to `set_timesteps` of a flow.

        Args:
            schedule: noise schedule, after its shift.
            sigmas: times before the shift.

        Returns:
            The knots; the last is clean.
        """
        return tuple(self._read(schedule, len(sigmas), sigmas=list(sigmas)))

    def _levels(self, schedule: Schedule, steps: int) -> list[Level]:
        return self._read(schedule, steps, num_inference_steps=steps)

    def _read(self, schedule: Schedule, steps: int, **arguments: Any) -> list[Level]:
        options: dict[str, Any] = dict(self.options)
        if options.get("use_dynamic_shifting"):
            arguments["mu"] = _mu(schedule, options.get("time_shift_type", "exponential"))
        try:
            with np.errstate(all="ignore"):
                scheduler = getattr(diffusers, self.scheduler)(**options)
                scheduler.set_timesteps(**arguments)
            levels = _listed_levels(scheduler, schedule)
        except (ValueError, TypeError, AttributeError, ArithmeticError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.scheduler} lists no levels for {steps} steps ({reason}): {OTHER_GRID}"
            ) from None
        if len(levels) != steps or not all(a < b for a, b in pairwise(levels)):
            raise ValueError(
                f"{self.scheduler} lists {len(levels)} levels for {steps} steps, from λ = "
                f"{levels[0]:g} to {levels[-1]:g}, expected one for each step, and each less noisy "
                f"than the one before: {OTHER_GRID}"
            )
        return [schedule.at(logsnr) for logsnr in (*levels, math.inf)]


def grid_from_config(config: Mapping[str, Any], schedule: Schedule) -> Grid:
    """The grid of a scheduler's config.

    It is the grid of diffcore that gives the scheduler's list, else a `SchedulerGrid`. That of a
    flow is always a `SchedulerGrid`, which also expresses the `sigmas` of its pipelines.

    Args:
        config: config with `_class_name`, completed by the defaults of its class.
        schedule: noise schedule of the config.

    Returns:
        The grid.

    Raises:
        ValueError: The scheduler lists no levels that fall in noise, such as an inverse one.
    """
    own = SchedulerGrid.of(config)
    entries = int(config.get("num_train_timesteps", 1000))
    counts = [steps for steps in COMPARED_STEPS if steps <= entries] or [entries]
    lists = [own.knots(schedule, steps) for steps in counts]
    if _is_flow(own.scheduler, config):
        return own
    try:
        grid = _named_grid(config, schedule)
        return grid if all(_are_equal(grid, schedule, knots) for knots in lists) else own
    except ValueError:  # it has no such knots
        return own


def _named_grid(config: Mapping[str, Any], schedule: Schedule) -> Grid:
    """The grid of diffcore that has the name of the config's spacing."""
    first, last = schedule.level(1.0), schedule.level(1 / config.get("num_train_timesteps", 1000))
    if config.get("use_karras_sigmas") or config.get("sigma_schedule") == "karras":
        return Karras(
            config.get("sigma_min") or float(last.ratio),
            # Lowered so that rounding cannot exceed the schedule.
            config.get("sigma_max") or float(first.ratio) * (1 - 1e-12),
        )
    if any(config.get(name) for name in LEVEL_OPTIONS):
        return UniformLogSNR(float(first.logsnr), float(last.logsnr))
    match config.get("timestep_spacing", "linspace"):
        case "leading":
            return Leading(config.get("steps_offset", 0))
        case "trailing":
            return Trailing()
    return Linspace()


def _are_equal(grid: Grid, schedule: Schedule, knots: tuple[Level, ...]) -> bool:
    pairs = zip(grid.knots(schedule, len(knots) - 1)[:-1], knots[:-1], strict=True)
    logsnrs = [(float(a.logsnr), float(b.logsnr)) for a, b in pairs]
    return all(a == b or abs(a - b) < ROUNDING for a, b in logsnrs)


def _is_flow(name: str, config: Mapping[str, Any]) -> bool:
    return name in FLOWS or bool(config.get("use_flow_sigmas"))


def _listed_levels(scheduler: Any, schedule: Schedule) -> list[float]:
    """λ of each distinct noisy level in the scheduler's list."""
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = _is_flow(name, config)
    if is_flow or any(config.get(option) for option in LEVEL_OPTIONS):
        sigmas = [sigma for sigma in map(float, scheduler.sigmas[:-1]) if sigma > 0]
        listed = [_logsnr(sigma, is_flow) for sigma in sigmas]
    else:
        index = TimeConditioning("index", float(config.num_train_timesteps))
        listed = [
            float(index.level(schedule, t).logsnr) for t in _listed_timesteps(scheduler, name)
        ]
    return list(dict.fromkeys(_within(schedule, logsnr) for logsnr in listed))


def _listed_timesteps(scheduler: Any, name: str) -> list[float]:
    """The timesteps at the knots, without those of the inner stages of a step."""
    if name == "PNDMScheduler":
        return [float(t) for t in scheduler._timesteps[::-1]]
    stride = 2 if name.startswith("KDPM2") else 1
    return [float(t) for t in scheduler.timesteps[::stride]]


def _logsnr(sigma: float, is_flow: bool) -> float:
    """λ of a diffusers sigma: σ/α, or σ/(α+σ) of a flow."""
    if is_flow and sigma == 1:
        return -math.inf
    return -2 * math.log(sigma / (1 - sigma) if is_flow else sigma)


def _within(schedule: Schedule, logsnr: float) -> float:
    lowest, highest = schedule.logsnr(1.0), float(schedule.cleanest.logsnr)
    bounded = min(max(logsnr, lowest), highest)
    return bounded if abs(bounded - logsnr) < ROUNDING else logsnr


def _mu(schedule: Schedule, shift_type: str) -> float:
    """μ of a shifted flow: its time shift s is σ/α at t = 1/2."""
    shift = float(schedule.level(0.5).ratio)
    return math.log(shift) if shift_type == "exponential" else shift


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
