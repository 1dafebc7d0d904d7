"""Export to diffusers: a process as a scheduler, and a network as a pipeline, if they express it.

    network                            scheduler                 pipeline of a UNet2DModel
    vp, time input i < T               DDIM or DDPM, by betas    DDIMPipeline or DDPMPipeline
    the same, a consistency network    LCM                       DDPMPipeline
    flow, time input T σ/(α+σ)         FlowMatchEulerDiscrete    DDPMPipeline
    edm, time input ln(σ/α)/4          EDMEuler                  ConsistencyModelPipeline
    vp or edm, with class labels       as above, also LCM        ConsistencyModelPipeline

`families/export_targets.py` describes the pipelines.
"""

import math
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import nn

from diffcore.core.estimate import require_posterior_mean
from diffcore.core.network import class_name
from diffcore.core.process import Process, TimeConditioning
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.families.export_targets import ALTERNATIVE
from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline
from diffcore.integrations.diffusers.scheduler.scheduler_config import C_NOISE
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.samplers import DDIM, DDPM, Consistency, EulerAncestral, Sampler
from diffcore.schedules import (
    Discrete,
    Flow,
    Grid,
    Karras,
    Leading,
    Level,
    Schedule,
    Shifted,
    Trailing,
    UniformLogSNR,
    ZeroTerminalSNR,
)

__all__ = [
    "build_pipeline",
    "export_consistency_scheduler",
    "export_pipeline",
    "export_scheduler",
]

ANCESTRAL = (DDPM(), DDPM(0.0), DDIM(1.0), EulerAncestral(1.0))
"""Samplers that diffusers calls DDPM; equal if the variance of the process is fixed."""
BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
"""Name of a table in diffcore -> `beta_schedule` of diffusers."""


def export_pipeline(pipe: DiffcorePipeline) -> Any:
    """Export a DiffcorePipeline: the diffusers pipeline that samples its network.

    It samples by DDIM, DDPM or Euler, without the guidance of `pipe`; a consistency network by the
    multistep sampling of LCMScheduler.

    Args:
        pipe: pipeline to export; its default sampler, grid and number of steps define the
            scheduler.

    Returns:
        The pipeline of diffusers.

    Raises:
        ValueError: No pipeline of diffusers expresses it; the message contains the reason.
    """
    settings, steps = pipe.scheduler.settings, pipe.config.num_inference_steps
    if pipe.process.estimate == "consistency":
        scheduler = export_consistency_scheduler(pipe.process)
        _check_multistep(settings, steps, scheduler.config["num_train_timesteps"])
    else:
        scheduler = export_scheduler(pipe.process, settings, steps)
    return build_pipeline(pipe.network, pipe.process, scheduler, pipe.vae)


def export_scheduler(process: Process, settings: SchedulerSettings, steps: int) -> Any:
    """Export a process: the diffusers scheduler that expresses it.

    Args:
        process: process of the network.
        settings: sampler, which determines DDIM or DDPM, and grid, which determines the timestep
            spacing or the bounds of σ/α.
        steps: number of steps of the grid; it changes only the bounds of σ/α (edm).

    Returns:
        The scheduler of diffusers.

    Raises:
        ValueError: No scheduler of diffusers expresses it; the message contains the reason.
    """
    require_posterior_mean(process, "a scheduler of diffusers for a network that denoises")
    match process.prediction:
        case "edm":
            return _edm_scheduler(process, settings.knots(steps), settings.grid)
        case "flow_prediction":
            return _flow_scheduler(process)
    return _table_scheduler(process, settings.sampler, settings.grid)


def build_pipeline(
    network: nn.Module, process: Process, scheduler: Any, vae: nn.Module | None
) -> Any:
    """The diffusers pipeline that evaluates a network as its process requires.

    Args:
        network: network of diffusers.
        process: process of the network.
        scheduler: scheduler of the pipeline.
        vae: decoder of latents, or None.

    Returns:
        The pipeline of diffusers.

    Raises:
        ValueError: No pipeline of diffusers expresses it; the message contains the reason.
    """
    target = family_of(network).export_target
    if target is None:
        raise ValueError(
            f"no pipeline of diffusers samples a {class_name(network)} alone: {ALTERNATIVE}"
        )
    return target.build(network, process, scheduler, vae)


def export_consistency_scheduler(process: Process) -> Any:
    """Export the process of a consistency network: the LCMScheduler that samples it.

    Its timesteps for n steps are those of the grid Trailing if n divides T, and its c_skip and
    c_out are 0 and 1 to 1e-5 at them.

    Args:
        process: process whose estimate is consistency, on a table of T levels.

    Returns:
        The scheduler of diffusers.

    Raises:
        ValueError: LCMScheduler does not express the process; the message contains the reason.
    """
    if process.prediction not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"LCMScheduler has no prediction type {process.prediction}: {ALTERNATIVE}")
    options = _table_options(process)
    cls: Any = diffusers.LCMScheduler
    return cls(**options, original_inference_steps=options["num_train_timesteps"])


def _check_multistep(settings: SchedulerSettings, steps: int, entries: int) -> None:
    """Raise ValueError if the steps of LCMScheduler are not those of a sampler and a grid."""
    if settings.sampler != Consistency():
        raise ValueError(
            f"LCMScheduler adds fresh noise to x_0 in each step, and the sampler is "
            f"{settings.sampler}: set the sampler to Consistency(), or {ALTERNATIVE}"
        )
    if settings.grid != Trailing() or entries % steps:
        raise ValueError(
            f"LCMScheduler evaluates evenly spaced entries of a table of {entries} from the last "
            f"one, and the knots are {steps} steps of {settings.grid}: set the grid to Trailing(), "
            f"if the network was trained on these levels, and steps to a divisor of {entries}, or "
            f"{ALTERNATIVE}"
        )


def _table_scheduler(process: Process, sampler: Sampler, grid: Grid) -> Any:
    options = _table_options(process) | {
        "timestep_spacing": "leading" if isinstance(grid, Leading) else "trailing",
        "steps_offset": grid.offset if isinstance(grid, Leading) else 0,
    }
    cls: Any = diffusers.DDIMScheduler
    if sampler in ANCESTRAL:
        cls = diffusers.DDPMScheduler
        if process.variance == "learned" and sampler == DDPM():
            _check_last_step(grid)
            options["variance_type"] = "learned_range"
    return cls(**options)


def _table_options(process: Process) -> dict[str, Any]:
    """The options of a scheduler of diffusers with a table of noise levels."""
    schedule, time = process.schedule, process.time
    entries = _entries(time, "index")
    if schedule.scaling != "vp":
        raise ValueError(
            f"schedulers of diffusers for {process.prediction} keep x of the vp process, and this "
            f"process has the scaling {schedule.scaling}: {ALTERNATIVE}"
        )
    if schedule.steps not in (None, entries):
        raise ValueError(
            f"the table has {schedule.steps} levels, but the time input of the network is an index "
            f"of {entries}: {ALTERNATIVE}"
        )
    process.check_level(schedule.level(1.0), "the last entry of diffusers' table")
    return {
        "num_train_timesteps": entries,
        "prediction_type": process.prediction,
        "clip_sample": False,
        **_betas(schedule, entries),
    }


def _check_last_step(grid: Grid) -> None:
    """Raise ValueError if diffusers would add noise of the learned variance to the result."""
    if grid != Leading():
        raise ValueError(
            "DDPMScheduler of diffusers adds noise of the learned variance to the result unless "
            f"its last timestep is 0, and that of {grid} is above: set the grid to Leading, or the "
            f"sampler to DDPM(0.0), or {ALTERNATIVE}"
        )


def _betas(schedule: Schedule, entries: int) -> dict[str, Any]:
    """Options of diffusers for the table: its name, or β_i = 1 - ᾱ_i/ᾱ_{i-1} at t = (i+1)/T."""
    inner = schedule.inner if isinstance(schedule, ZeroTerminalSNR) else schedule
    if isinstance(inner, Discrete) and inner.betas in BETA_SCHEDULES:
        named = {
            "beta_schedule": BETA_SCHEDULES[str(inner.betas)],
            "beta_start": inner.start,
            "beta_end": inner.end,
        }
        return named | {"rescale_betas_zero_snr": inner is not schedule}
    t = torch.arange(1, entries + 1, dtype=torch.float64) / entries
    log_alpha_bar = torch.nn.functional.logsigmoid(schedule.logsnr(t))
    before = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_bar[:-1]])
    return {"trained_betas": (-(log_alpha_bar - before).expm1()).tolist()}


def _flow_scheduler(process: Process) -> Any:
    schedule = process.schedule
    linear = process.time.variable == "t" and schedule == Flow()  # T t is T σ
    entries = _entries(replace(process.time, variable="blend") if linear else process.time, "blend")
    if schedule.scaling != "flow":
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler keeps x of the flow, and this process has the "
            f"scaling {schedule.scaling}: {ALTERNATIVE}"
        )
    if schedule.logsnr(1.0) > -math.inf:
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler begins at pure noise, and {schedule} ends at λ = "
            f"{schedule.logsnr(1.0):.4g}: {ALTERNATIVE}"
        )
    shift = 1.0
    if isinstance(schedule, Shifted) and schedule.inner == Flow():
        shift = math.exp(-schedule.shift / 2)
    cls: Any = diffusers.FlowMatchEulerDiscreteScheduler
    return cls(num_train_timesteps=entries, shift=shift)


def _edm_scheduler(process: Process, knots: tuple[Level, ...], grid: Grid) -> Any:
    if (process.time.variable, process.time.scale) != (C_NOISE.variable, C_NOISE.scale):
        raise ValueError(
            "EDMEulerScheduler has the time input ln(σ/α)/4 (logsnr, scale -1/8), and the network "
            f"has {process.time}: {ALTERNATIVE}"
        )
    first, last = knots[0].ratio, knots[-2].ratio
    if not 0 < last < first < math.inf:
        raise ValueError(
            f"EDMEulerScheduler goes between two finite σ/α, and {grid} from {first:g} to "
            f"{last:g}: sample by Karras() (grid, in the run's config.yaml)"
        )
    is_exponential = isinstance(grid, UniformLogSNR)
    cls: Any = diffusers.EDMEulerScheduler
    return cls(
        sigma_min=float(last),
        sigma_max=float(first),
        sigma_data=process.sigma_data,
        sigma_schedule="exponential" if is_exponential else "karras",
        rho=grid.rho if isinstance(grid, Karras) else 7.0,
    )


def _entries(time: TimeConditioning, variable: str) -> int:
    """T of the time input; ValueError if it is not that of a table or a flow."""
    if time.variable != variable or time.scale != round(time.scale) or time.scale < 2:
        expected = (
            "index i of a table of T levels" if variable == "index" else "T σ/(α+σ) of a flow"
        )
        raise ValueError(
            f"schedulers of diffusers have the time input {expected}, and the network has {time}: "
            f"train with variable {variable}, or {ALTERNATIVE}"
        )
    return round(time.scale)
