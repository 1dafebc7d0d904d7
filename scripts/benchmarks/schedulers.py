"""Diffusers' deterministic schedulers on an exact denoiser: a thin adapter, asked at exactly the level that each steps from.

Their tables are their own: DDPM's linear betas, σ as they space it. Only what could not be compared is set: clipping is off,
EDM's schedulers begin at the same σ, and one that ends at a noisy level (DEIS, SA-Solver) has its last x denoised once more.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import diffusers
from torch import Tensor

from benchmarks.accuracy import COUNTS, WIDEST, Problem, Score
from diffcore.core.prediction import PredictionType, target
from diffcore.schedules import Cosine, Level, Scaling

SIGMA_DATA = 0.5
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' with its options, and what it takes x and the network's output to be.

    Args:
        method: its name here.
        grid: its spacing's name here.
        build: makes it, anew for each run since it holds the run's state.
        scaling: of its x.
        output: what it is given.
        ratio: σ/α at call i, t its timestep.
        steps: how `set_timesteps` is told the number of steps.
    """

    method: str
    grid: str
    build: Callable[[], Any]
    scaling: Scaling = "vp"
    output: PredictionType = "epsilon"
    ratio: Callable[[Any, int, Tensor], float] = lambda scheduler, i, t: float(scheduler.sigmas[i])
    steps: Callable[[Any, int], None] = lambda scheduler, n: scheduler.set_timesteps(n)

    def ready(self, count: int) -> Any:
        """With the most steps that `count` calls allow, at one call a step, one more in all, or two; nothing where none is."""
        for n in (count, count - 1, (count + 1) // 2):
            scheduler = self.build()
            try:
                self.steps(scheduler, n)
            except (ValueError, IndexError):
                continue
            if len(scheduler.timesteps) + (self.rest(scheduler) > 0) <= count:
                return scheduler
        return None

    def rest(self, scheduler: Any) -> float:
        """σ/α of the last level."""
        return float(scheduler.sigmas[-1]) if self.ratio is Scheduler.ratio else 0.0

    def level(self, ratio: float) -> Level:
        """Where σ/α is this, in the scheduler's scaling."""
        return Cosine(scaling=self.scaling).at(
            -2 * math.log(ratio) if ratio < math.inf else -math.inf
        )

    def run(self, problem: Problem, scheduler: Any) -> tuple[Tensor, int]:
        """The loop of a pipeline: x at the end, and the evaluations."""
        x, oracle = None, problem.oracle
        for i, t in enumerate(scheduler.timesteps):
            level = self.level(self.ratio(scheduler, i, t))
            x = problem.at(level) if x is None else x
            scheduler.scale_model_input(x, t) if hasattr(
                scheduler, "scale_model_input"
            ) else None  # some insist
            output = target(self.output, *oracle(x, level), level, SIGMA_DATA)
            x = scheduler.step(output, t, x, return_dict=False)[0].double()
        assert x is not None
        rest = self.rest(scheduler)
        return (oracle(x, self.level(rest)).x0 if rest else x), len(scheduler.timesteps) + (
            rest > 0
        )


def theirs(
    problem: Problem, counts: tuple[int, ...] = COUNTS
) -> Iterator[tuple[str, str, int, int, Score]]:
    """(scheduler, spacing, count, evaluations, score) of all that can be run."""
    for entry in SCHEDULERS:
        for count in counts:
            scheduler = entry.ready(count)
            if scheduler is not None:
                x, evaluations = entry.run(problem, scheduler)
                yield entry.method, entry.grid, count, evaluations, problem.score(x)


# The list ------------------------------------------------------------------------------------------------------------

SPACED = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
}
SIGMAS = {"Karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
SIGMAS |= {"beta": {"use_beta_sigmas": True}}
LU = {"Lu": {"use_lu_lambdas": True}}


def _table(scheduler: Any, i: int, t: Tensor) -> float:
    """Of the cumulative product at the timestep."""
    alpha_bar = float(scheduler.alphas_cumprod[int(t)].double())
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def _stage(scheduler: Any, i: int, t: Tensor) -> float:
    """KDPM2's: a knot, then its midpoint."""
    return float((scheduler.sigmas_interpol if i % 2 else scheduler.sigmas)[i])


def _blend(scheduler: Any, i: int, t: Tensor) -> float:
    """Of σ = a."""
    a = float(scheduler.sigmas[i])
    return a / (1 - a) if a < 1 else math.inf


def _cosine(scheduler: Any, i: int, t: Tensor) -> float:
    """IPNDM's: σ = sin²(πt/2) of a vp process."""
    sigma, alpha = float(scheduler.betas[i]), float(scheduler.alphas[i])
    return sigma / alpha if alpha else math.inf


def _of(
    method: str,
    name: str,
    grids: dict[str, Any],
    given: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> list[Scheduler]:
    make = getattr(diffusers, name)
    return [Scheduler(method, grid, partial(make, **BETAS, **given, **options), **fields)
            for grid, options in grids.items()]  # fmt: skip


def _edm(method: str, name: str, **given: Any) -> list[Scheduler]:
    make = getattr(diffusers, name)
    return [Scheduler(method, grid, partial(make, sigma_max=WIDEST, sigma_schedule=grid, **given), "ve", "edm")
            for grid in ("karras", "exponential")]  # fmt: skip


def _flow(method: str, name: str, grid: str = "flow", **given: Any) -> list[Scheduler]:
    make = getattr(diffusers, name)
    return [Scheduler(method, grid, lambda: make(**given), "flow", "flow_prediction", _blend)]


MULTI = {"prediction_type": "sample"}
SCHEDULERS: list[Scheduler] = [
    *_of("DDIM", "DDIMScheduler", SPACED, {"clip_sample": False}, ratio=_table),
    *_of("PNDM", "PNDMScheduler", {"trailing": SPACED["trailing"]},
         {"skip_prk_steps": True, "set_alpha_to_one": True}, ratio=_table),
    *_of("Euler", "EulerDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("Heun", "HeunDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("LMS", "LMSDiscreteScheduler", SPACED | SIGMAS, scaling="ve"),
    *_of("KDPM2", "KDPM2DiscreteScheduler", SPACED | SIGMAS, scaling="ve", ratio=_stage),
    *(s for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun"))
      for s in _of(f"DPM++ {order}M {kind}", "DPMSolverMultistepScheduler", SPACED | SIGMAS | LU,
                   MULTI | {"solver_order": order, "solver_type": kind}, output="sample")),
    *(s for order in (2, 3)
      for s in _of(f"DPM++ {order}S", "DPMSolverSinglestepScheduler", {"linspace": {}} | SIGMAS,
                   MULTI | {"solver_order": order, "lower_order_final": True}, output="sample")),
    *(s for order in (2, 3)
      for s in _of(f"UniPC {order}", "UniPCMultistepScheduler", SPACED | SIGMAS, MULTI | {"solver_order": order},
                   output="sample")),
    *(s for order in (2, 3)
      for s in _of(f"DEIS {order}", "DEISMultistepScheduler", SPACED | SIGMAS, MULTI | {"solver_order": order},
                   output="sample")),
    *_of("SA-Solver", "SASolverScheduler", SPACED | SIGMAS,
         MULTI | {"predictor_order": 3, "corrector_order": 3, "tau_func": lambda t: 0.0}, output="sample"),
    Scheduler("IPNDM", "own", diffusers.IPNDMScheduler, "vp", "v_prediction", _cosine),
    *_edm("EDM Euler", "EDMEulerScheduler"),
    *(s for order in (2, 3) for s in _edm(f"EDM DPM++ {order}M", "EDMDPMSolverMultistepScheduler", solver_order=order)),
    *_flow("flow Euler", "FlowMatchEulerDiscreteScheduler"),
    *_flow("flow Heun", "FlowMatchHeunDiscreteScheduler"),
    *(s for order in (2, 3)
      for s in _flow(f"DPM++ {order}M midpoint", "DPMSolverMultistepScheduler", solver_order=order,
                     use_flow_sigmas=True, prediction_type="flow_prediction")),
    *(s for order in (2, 3)
      for s in _flow(f"UniPC {order}", "UniPCMultistepScheduler", solver_order=order, use_flow_sigmas=True,
                     prediction_type="flow_prediction")),
]  # fmt: skip
"""Left out: spacing `leading`, which begins at less noise; UniPC bh1, NaN at clean; DPM-Solver in ε, which ends noisy."""
