"""Export: a process as a diffusers scheduler, and a network as a diffusers pipeline, where they
express it exactly.

    x, and time input                  scheduler                      pipeline of a UNet2DModel
    with labels, or edm vp, index i of T                   DDIM or DDPM, by its betas
    DDIMPipeline or DDPMPipeline     ConsistencyModelPipeline flow, T σ/(α+σ)
    FlowMatchEulerDiscrete         DDPMPipeline edm, ln(σ/α)/4                     EDMEuler
    ConsistencyModelPipeline

and DiTPipeline of a DiTTransformer2DModel with a VAE. ConsistencyModelPipeline is the only
diffusers pipeline of a UNet2DModel that passes class labels, and the only one that calls
scale_model_input of its scheduler; it takes any such scheduler.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process, TimeConditioning
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.families.export_targets import ALTERNATIVE
from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise
from diffcore.integrations.diffusers.scheduler.scheduler_config import C_NOISE
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.samplers import DDIM, DDPM, EulerAncestral, Sampler
from diffcore.sampling.generation import evaluation_mode
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    Discrete,
    Flow,
    Grid,
    Karras,
    Leading,
    Level,
    Rescaled,
    Schedule,
    Shifted,
    UniformLogSNR,
    ZeroTerminalSNR,
)

__all__ = [
    "RecordedStep",
    "build_pipeline",
    "check",
    "exact_steps",
    "export_pipeline",
    "export_scheduler",
    "parity",
]

ANCESTRAL = (DDPM(0.0), DDIM(1.0), EulerAncestral(1.0))
"""Equal samplers, which diffusers calls DDPM."""
TOLERANCE = 1e-4
"""Bound on the largest difference of samples, relative to the largest value."""
FORMS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def export_pipeline(pipe: DiffcorePipeline) -> Any:
    """The diffusers pipeline that samples the network of a DiffcorePipeline, by DDIM or DDPM and
    without guidance.

    Returns:
        The pipeline.

    Raises:
        ValueError: There is none; the message contains the reason.
    """
    scheduler = export_scheduler(
        pipe.process, pipe.scheduler.settings, pipe.config.num_inference_steps
    )
    return build_pipeline(pipe.network, pipe.process, scheduler, pipe.vae)


def export_scheduler(process: Process, settings: SchedulerSettings, steps: int) -> Any:
    """The diffusers scheduler that expresses a process.

    Args:
        process: process of the network.
        settings: its sampler determines DDIM or DDPM, its grid the spacing and the bounds.
        steps: number of steps, for the bounds of the grid.

    Returns:
        The scheduler.

    Raises:
        ValueError: There is none; the message contains the reason.
    """
    match process.prediction:
        case "edm":
            return _edm(process, settings.knots(steps), settings.grid)
        case "flow_prediction":
            return _flow(process)
    return _table(process, settings.sampler, settings.grid)


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
        The pipeline.

    Raises:
        ValueError: There is none; the message contains the reason.
    """
    target = family_of(network).export_target
    if target is None:
        raise ValueError(
            f"no pipeline of diffusers samples a {type(network).__name__} alone: {ALTERNATIVE}"
        )
    return target.build(network, process, scheduler, vae)


# Schedulers


def _table(process: Process, sampler: Sampler, grid: Grid) -> Any:
    schedule, time = process.schedule, process.time
    entries = _entries(time, "index")
    if schedule.scaling != "vp":
        raise ValueError(
            f"schedulers of diffusers that take {process.prediction} keep x of the vp process, and "
            "this one is of the "
            f"scaling {schedule.scaling}: {ALTERNATIVE}"
        )
    if schedule.steps not in (None, entries):
        raise ValueError(
            f"the table has {schedule.steps} levels, but the time input of the network is an index "
            f"of {entries}: {ALTERNATIVE}"
        )
    process.check_level(schedule.level(1.0), "the last entry of diffusers' table")
    leading = isinstance(grid, Leading)
    options = {
        "num_train_timesteps": entries,
        "prediction_type": process.prediction,
        "clip_sample": False,
        "timestep_spacing": "leading" if leading else "trailing",
        "steps_offset": grid.offset if isinstance(grid, Leading) else 0,
    }
    kind = diffusers.DDPMScheduler if sampler in ANCESTRAL else diffusers.DDIMScheduler
    return kind(**options, **_betas(schedule, entries))


def _betas(schedule: Schedule, entries: int) -> dict[str, Any]:
    """The options of a named table, or β_i = 1 - ᾱ_i/ᾱ_{i-1} at the entries t = (i+1)/T of any
    schedule.
    """
    inner = schedule.inner if isinstance(schedule, ZeroTerminalSNR) else schedule
    if isinstance(inner, Discrete) and inner.betas in FORMS:
        named = {
            "beta_schedule": FORMS[str(inner.betas)],
            "beta_start": inner.start,
            "beta_end": inner.end,
        }
        return named | {"rescale_betas_zero_snr": inner is not schedule}
    t = torch.arange(1, entries + 1, dtype=torch.float64) / entries
    log_alpha_bar = torch.nn.functional.logsigmoid(schedule.logsnr(t))
    before = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_bar[:-1]])
    return {"trained_betas": (-(log_alpha_bar - before).expm1()).tolist()}


def _flow(process: Process) -> Any:
    schedule = process.schedule
    linear = process.time.variable == "t" and schedule == Flow()  # T t is T σ
    entries = _entries(replace(process.time, variable="blend") if linear else process.time, "blend")
    if schedule.scaling != "flow":
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler keeps x of the flow, and this process is of the "
            f"scaling {schedule.scaling}: "
            f"{ALTERNATIVE}"
        )
    if schedule.logsnr(1.0) > -math.inf:
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler begins at pure noise, and {schedule} ends at λ = "
            f"{schedule.logsnr(1.0):.4g}: "
            f"{ALTERNATIVE}"
        )
    shifted = isinstance(schedule, Shifted) and schedule.inner == Flow()
    shift = math.exp(-schedule.shift / 2) if isinstance(schedule, Shifted) and shifted else 1.0
    kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
    return kind(num_train_timesteps=entries, shift=shift)


def _edm(process: Process, knots: tuple[Level, ...], grid: Grid) -> Any:
    if (process.time.variable, process.time.scale) != (C_NOISE.variable, C_NOISE.scale):
        raise ValueError(
            "EDMEulerScheduler has the time input ln(σ/α)/4 (logsnr, scale -1/8), and the network "
            f"has {process.time}: {ALTERNATIVE}"
        )
    first, last = knots[0].ratio, knots[-2].ratio
    if not 0 < last < first < math.inf:
        raise ValueError(
            f"EDMEulerScheduler goes between two finite σ/α, and {grid} from {first:g} to "
            f"{last:g}: sample by Karras() "
            f"(grid, in the run's config.yaml)"
        )
    even = isinstance(grid, UniformLogSNR)
    kind: Any = diffusers.EDMEulerScheduler
    return kind(
        sigma_min=float(last),
        sigma_max=float(first),
        sigma_data=process.sigma_data,
        sigma_schedule="exponential" if even else "karras",
        rho=grid.rho if isinstance(grid, Karras) else 7.0,
    )


def _entries(time: TimeConditioning, variable: str) -> int:
    """T of the time input; ValueError if it is not that of a table or a flow."""
    if time.variable != variable or time.scale != round(time.scale) or time.scale < 2:
        expected = {"index": "index i of a table of T levels", "blend": "T σ/(α+σ) of a flow"}[
            variable
        ]
        raise ValueError(
            f"schedulers of diffusers have the time input {expected}, and the network has {time}: "
            f"train with variable {variable}, "
            f"or {ALTERNATIVE}"
        )
    return round(time.scale)


# Parity


class RecordedStep:
    """The `step` of a scheduler, which records its first input x and its last result."""

    def __init__(self, scheduler: Any) -> None:
        self.step = scheduler.step
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        scheduler.step = self

    def __call__(self, output: Tensor, t: Any, x: Tensor, **options: Any) -> Any:
        result = self.step(output, t, x, **options)
        self.first, self.last = x if self.first is None else self.first, result[0]
        return result


def parity(folder: Path, pipe: DiffcorePipeline) -> float:
    """Largest difference between two samples of an exported pipeline and of the diffcore loop, over
    their largest value.

    The pipeline is loaded from the folder and called as a user calls it. The loop evaluates the
    levels of its scheduler, with the same noise.

    Args:
        folder: folder of the exported pipeline.
        pipe: pipeline that was exported.

    Returns:
        The relative difference.
    """
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    exported = load(folder)
    exported.set_progress_bar_config(disable=True)
    recorded, labels = RecordedStep(exported.scheduler), _labels(pipe.process)
    steps = exact_steps(exported.scheduler, pipe.config.num_inference_steps)
    target = family_of(pipe.network).export_target
    assert target is not None
    call = target.call_arguments(2, None if labels is None else labels.tolist())
    exported(**call, num_inference_steps=steps, generator=_generator(), output_type="np")
    assert recorded.first is not None
    assert recorded.last is not None
    ours = _ours(pipe.denoiser, exported.scheduler, recorded.first, labels)
    return float((ours - recorded.last).abs().max() / recorded.last.abs().max())


def check(folder: Path, pipe: DiffcorePipeline) -> float:
    """The relative difference of `parity`.

    Args:
        folder: folder of the exported pipeline.
        pipe: pipeline that was exported.

    Returns:
        The difference.

    Raises:
        ValueError: It exceeds the tolerance.
    """
    difference = parity(folder, pipe)
    if not difference <= TOLERANCE:  # NaN too
        raise ValueError(
            f"samples of the exported pipeline differ from those of diffcore by {difference:.3g} "
            "of their largest value, expected at most "
            f"{TOLERANCE:g}: {ALTERNATIVE}"
        )
    return difference


def exact_steps(scheduler: Any, steps: int) -> int:
    """The largest number of steps, at most `steps`, with which a scheduler is exact: DDIM and DDPM
    step to t - T // n, so that it divides T.
    """
    if not isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler)):
        return steps
    config: Any = scheduler.config  # type: ignore[union-attr]
    entries: int = config.num_train_timesteps
    return next(n for n in range(min(steps, entries), 0, -1) if entries % n == 0)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _labels(process: Process) -> Tensor | None:
    return torch.tensor([0, process.classes - 1]) if process.classes else None


def _ours(denoiser: Denoiser, scheduler: Any, x: Tensor, labels: Tensor | None) -> Tensor:
    process = _kept(denoiser.process)
    numbers = [float(t) for t in scheduler.timesteps]
    levels = [process.time.level(process.schedule, number) for number in numbers]
    noise = GeneratorNoise(
        torch.zeros(len(x), dtype=torch.int64), process.shape, x.device, generator=_generator()
    )
    noise.start()  # the pipeline draws its first x
    sampler = DDPM() if isinstance(scheduler, diffusers.DDPMScheduler) else DDIM()
    labels = None if labels is None else labels.to(x.device)
    knots = (*levels, process.schedule.at(math.inf))
    with torch.no_grad(), evaluation_mode(denoiser):
        return integrate(
            Denoiser(denoiser.network, process), sampler, x, knots, noise, condition=labels
        )[0]


def _kept(process: Process) -> Process:
    """The process in the scaling of the scheduler's x: ve for edm, whose network input is the same
    in every scaling.
    """
    if process.prediction != "edm" or process.schedule.scaling == "ve":
        return process
    return replace(process, schedule=Rescaled(process.schedule, "ve"))
