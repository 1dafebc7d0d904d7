"""The deterministic schedulers of diffusers with an exact denoiser at their own levels.

They keep their own tables: DDPM's linear betas, and σ as they space it. Three settings make them
comparable: clipping is off, EDM's schedulers begin at the common σ, and if a scheduler ends at a
noisy level (DEIS, SA-Solver), its last x is denoised once more.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import diffusers
from torch import Tensor

from benchmarks.accuracy import LARGEST_SIGMA, Combination, Ends, Problem
from diffcore.core.prediction import PredictionType, target
from diffcore.schedules import Cosine, Level, Scaling

SIGMA_DATA = 0.5
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass(frozen=True)
class ConfiguredScheduler:
    """A scheduler of diffusers with its options, and its conventions for x and the network output.

    Args:
        method: name of the method in the tables.
        grid: name of the spacing in the tables.
        build: function that builds the scheduler; a scheduler holds the state of one run.
        scaling: scaling of its x.
        output: network output that it expects.
        ratio: function that returns σ/α at call i with timestep t.
    """

    method: str
    grid: str
    build: Callable[[], Any]
    scaling: Scaling = "vp"
    output: PredictionType = "epsilon"
    ratio: Callable[[Any, int, Tensor], float] = lambda scheduler, i, t: float(scheduler.sigmas[i])

    def prepare(self, count: int) -> Any:
        """Build the scheduler with the largest number of steps that so many evaluations allow.

        A step takes one evaluation or two, or one more is needed at the end.

        Args:
            count: number of evaluations.

        Returns:
            The scheduler, or None if not even one step is possible.
        """
        for n in (count, count - 1, (count + 1) // 2):
            scheduler = self.build()
            try:
                scheduler.set_timesteps(n)
            except (ValueError, IndexError):
                continue
            if len(scheduler.timesteps) + (self.last_ratio(scheduler) > 0) <= count:
                return scheduler
        return None

    def last_ratio(self, scheduler: Any) -> float:
        """The ratio σ/α of the last level, a number."""
        return float(scheduler.sigmas[-1]) if self.ratio is ConfiguredScheduler.ratio else 0.0

    def level(self, ratio: float) -> Level:
        """Find a level in the scheduler's scaling.

        Args:
            ratio: σ/α.

        Returns:
            The level.
        """
        return Cosine(scaling=self.scaling).at(
            -2 * math.log(ratio) if ratio < math.inf else -math.inf
        )

    def run(self, problem: Problem, count: int) -> Ends | None:
        """Run the loop of a pipeline.

        Args:
            problem: exact denoiser and starts.
            count: largest number of evaluations.

        Returns:
            x at the end and the number of evaluations, or None if not even one step is possible.
        """
        scheduler, x, oracle = self.prepare(count), None, problem.oracle
        if scheduler is None:
            return None
        for i, t in enumerate(scheduler.timesteps):
            level = self.level(self.ratio(scheduler, i, t))
            x = problem.at(level) if x is None else x
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # some schedulers refuse to step without it
            output = target(self.output, *oracle(x, level), level, SIGMA_DATA)
            x = scheduler.step(output, t, x, return_dict=False)[0].double()
        assert x is not None
        last = self.last_ratio(scheduler)
        x = oracle(x, self.level(last)).x0 if last else x
        return x, len(scheduler.timesteps) + (last > 0)


def diffusers_combinations() -> Iterator[Combination]:
    """All schedulers of diffusers.

    Yields:
        The combinations of scheduler and spacing.
    """
    for entry in SCHEDULERS:
        yield Combination(entry.method, entry.grid, entry.run)


# The list -----------------------------------------------------------------------------------------

SPACED = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
}
SIGMAS = {"Karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
SIGMAS |= {"beta": {"use_beta_sigmas": True}}
LU = {"Lu": {"use_lu_lambdas": True}}


def _table(scheduler: Any, i: int, t: Tensor) -> float:
    """σ/α from the cumulative product at the timestep."""
    alpha_bar = float(scheduler.alphas_cumprod[int(t)].double())
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def _stage(scheduler: Any, i: int, t: Tensor) -> float:
    """σ/α of KDPM2: that of a knot, then that of its midpoint."""
    return float((scheduler.sigmas_interpol if i % 2 else scheduler.sigmas)[i])


def _blend(scheduler: Any, i: int, t: Tensor) -> float:
    """σ/α of flow schedulers, whose σ is a."""
    a = float(scheduler.sigmas[i])
    return a / (1 - a) if a < 1 else math.inf


def _cosine(scheduler: Any, i: int, t: Tensor) -> float:
    """σ/α of IPNDM, whose betas are σ = sin²(πt/2) of a vp process."""
    sigma, alpha = float(scheduler.betas[i]), float(scheduler.alphas[i])
    return sigma / alpha if alpha else math.inf


def _of(
    method: str,
    name: str,
    grids: dict[str, Any],
    given: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> list[ConfiguredScheduler]:
    make = getattr(diffusers, name)
    return [
        ConfiguredScheduler(method, grid, partial(make, **BETAS, **given, **options), **fields)
        for grid, options in grids.items()
    ]


def _edm(method: str, name: str, **given: Any) -> list[ConfiguredScheduler]:
    make = getattr(diffusers, name)
    builds = {
        grid: partial(make, sigma_max=LARGEST_SIGMA, sigma_schedule=grid, **given)
        for grid in ("karras", "exponential")
    }
    return [ConfiguredScheduler(method, grid, build, "ve", "edm") for grid, build in builds.items()]


def _flow(method: str, name: str, **given: Any) -> list[ConfiguredScheduler]:
    make = getattr(diffusers, name)
    return [
        ConfiguredScheduler(
            method, "flow", lambda: make(**given), "flow", "flow_prediction", _blend
        )
    ]


MULTI = {"prediction_type": "sample"}
SCHEDULERS: list[ConfiguredScheduler] = [
    *_of("DDIM", "DDIMScheduler", SPACED, {"clip_sample": False}, ratio=_table),
    *_of(
        "PNDM",
        "PNDMScheduler",
        {"trailing": SPACED["trailing"]},
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        ratio=_table,
    ),
    *_of("Euler", "EulerDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("Heun", "HeunDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("LMS", "LMSDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("KDPM2", "KDPM2DiscreteScheduler", SPACED | SIGMAS, scaling="ve", ratio=_stage),
    *(
        s
        for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun"))
        for s in _of(
            f"DPM++ {order}M {kind}",
            "DPMSolverMultistepScheduler",
            SPACED | SIGMAS | LU,
            MULTI | {"solver_order": order, "solver_type": kind},
            output="sample",
        )
    ),
    *(
        s
        for order in (2, 3)
        for s in _of(
            f"DPM++ {order}S",
            "DPMSolverSinglestepScheduler",
            {"linspace": {}} | SIGMAS,
            MULTI | {"solver_order": order, "lower_order_final": True},
            output="sample",
        )
    ),
    *(
        s
        for order in (2, 3)
        for s in _of(
            f"UniPC {order}",
            "UniPCMultistepScheduler",
            SPACED | SIGMAS,
            MULTI | {"solver_order": order},
            output="sample",
        )
    ),
    *(
        s
        for order in (2, 3)
        for s in _of(
            f"DEIS {order}",
            "DEISMultistepScheduler",
            SPACED | SIGMAS,
            MULTI | {"solver_order": order},
            output="sample",
        )
    ),
    *_of(
        "SA-Solver",
        "SASolverScheduler",
        SPACED | SIGMAS,
        MULTI | {"predictor_order": 3, "corrector_order": 3, "tau_func": lambda t: 0.0},
        output="sample",
    ),
    ConfiguredScheduler("IPNDM", "own", diffusers.IPNDMScheduler, "vp", "v_prediction", _cosine),
    *_edm("EDM Euler", "EDMEulerScheduler"),
    *(
        s
        for order in (2, 3)
        for s in _edm(f"EDM DPM++ {order}M", "EDMDPMSolverMultistepScheduler", solver_order=order)
    ),
    *_flow("flow Euler", "FlowMatchEulerDiscreteScheduler"),
    *_flow("flow Heun", "FlowMatchHeunDiscreteScheduler"),
    *(
        s
        for order in (2, 3)
        for s in _flow(
            f"DPM++ {order}M midpoint",
            "DPMSolverMultistepScheduler",
            solver_order=order,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
    ),
    *(
        s
        for order in (2, 3)
        for s in _flow(
            f"UniPC {order}",
            "UniPCMultistepScheduler",
            solver_order=order,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
    ),
]
"""Excluded: spacing `leading` (starts at less noise), UniPC bh1 (NaN), DPM-Solver in ε (noisy)."""
