"""A process as a scheduler of diffusers, and a network as one of its own pipelines, where these express it exactly.

    x, and what the network is told    scheduler                      pipeline of a UNet2DModel        with labels, or edm
    vp, index i of T                   DDIM or DDPM, by its betas     DDIMPipeline or DDPMPipeline     ConsistencyModelPipeline
    flow, T σ/(α+σ)                    FlowMatchEulerDiscrete         DDPMPipeline
    edm, ln(σ/α)/4                     EDMEuler                                                        ConsistencyModelPipeline

and DiTPipeline of a DiTTransformer2DModel with a VAE. ConsistencyModelPipeline is diffusers' one pipeline of a UNet2DModel that
passes class labels, and the one that scales the network's input as its scheduler says; it takes any scheduler that says so.
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
from diffcore.integrations.diffusers.scheduler.generator_noise import Drawn
from diffcore.integrations.diffusers.scheduler.scheduler_config import C_NOISE
from diffcore.integrations.diffusers.scheduler.settings import Settings
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

ANCESTRAL = (DDPM(0.0), DDIM(1.0), EulerAncestral(1.0))
"""Names of one sampler, diffusers' DDPM."""
TOLERANCE = 1e-4
"""Of the greatest difference of samples, relative to the greatest value."""
FORMS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def stock_of(pipe: DiffcorePipeline) -> Any:
    """The pipeline of diffusers that samples the network of one of ours, by DDIM or DDPM and without its guidance.

    Raises:
        ValueError: none does; the message has the reason.
    """
    scheduler = scheduler_of(pipe.process, pipe.scheduler.settings, pipe.config.num_inference_steps)
    return pipeline_of(pipe.network, pipe.process, scheduler, pipe.vae)


def scheduler_of(process: Process, settings: Settings, steps: int) -> Any:
    """The scheduler of diffusers that expresses a process; of the sampler it takes whether it is DDPM, of the grid the ends.

    Raises:
        ValueError: none does; the message has the reason.
    """
    match process.prediction:
        case "edm":
            return _edm(process, settings.knots(steps), settings.grid)
        case "flow_prediction":
            return _flow(process)
    return _table(process, settings.sampler, settings.grid)


def pipeline_of(network: nn.Module, process: Process, scheduler: Any, vae: nn.Module | None) -> Any:
    """The pipeline of diffusers that asks a network as its process has it.

    Raises:
        ValueError: none does; the message has the reason.
    """
    target = family_of(network).export_target
    if target is None:
        raise ValueError(
            f"no pipeline of diffusers samples a {type(network).__name__} alone: {ALTERNATIVE}"
        )
    return target.build(network, process, scheduler, vae)


# Schedulers ----------------------------------------------------------------------------------------------------------


def _table(process: Process, sampler: Sampler, grid: Grid) -> Any:
    schedule, time = process.schedule, process.time
    entries = _entries(time, "index")
    if schedule.scaling != "vp":
        raise ValueError(
            f"schedulers of diffusers that take {process.prediction} keep x of the vp process, and this one is of the "
            f"scaling {schedule.scaling}: {ALTERNATIVE}"
        )
    if schedule.steps not in (None, entries):
        raise ValueError(
            f"the table has {schedule.steps} levels, but the network is told an index of {entries}: {ALTERNATIVE}"
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
    """A table of a form that has a name, or β_i = 1 - ᾱ_i/ᾱ_{i-1} at the entries t = (i+1)/T of any schedule."""
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
            f"FlowMatchEulerDiscreteScheduler keeps x of the flow, and this process is of the scaling {schedule.scaling}: "
            f"{ALTERNATIVE}"
        )
    if schedule.logsnr(1.0) > -math.inf:
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler begins at pure noise, and {schedule} ends at λ = {schedule.logsnr(1.0):.4g}: "
            f"{ALTERNATIVE}"
        )
    shifted = isinstance(schedule, Shifted) and schedule.inner == Flow()
    shift = math.exp(-schedule.shift / 2) if isinstance(schedule, Shifted) and shifted else 1.0
    kind: Any = diffusers.FlowMatchEulerDiscreteScheduler
    return kind(num_train_timesteps=entries, shift=shift)


def _edm(process: Process, knots: tuple[Level, ...], grid: Grid) -> Any:
    if (process.time.variable, process.time.scale) != (C_NOISE.variable, C_NOISE.scale):
        raise ValueError(
            f"EDMEulerScheduler tells the network ln(σ/α)/4 (logsnr, scale -1/8), and it is told {process.time}: {ALTERNATIVE}"
        )
    first, last = knots[0].ratio, knots[-2].ratio
    if not 0 < last < first < math.inf:
        raise ValueError(
            f"EDMEulerScheduler goes between two finite σ/α, and {grid} from {first:g} to {last:g}: sample by Karras() "
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
    """T, where the network is told the level as a scheduler's table or flow has it."""
    if time.variable != variable or time.scale != round(time.scale) or time.scale < 2:
        told = {"index": "index i of a table of T levels", "blend": "T σ/(α+σ) of a flow"}[variable]
        raise ValueError(
            f"schedulers of diffusers tell the network the {told}, and it is told {time}: train with variable {variable}, "
            f"or {ALTERNATIVE}"
        )
    return round(time.scale)


# Parity --------------------------------------------------------------------------------------------------------------


class Recorded:
    """A scheduler's `step` that keeps the first x that it is given and the last that it answers."""

    def __init__(self, scheduler: Any) -> None:
        self.step = scheduler.step
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        scheduler.step = self

    def __call__(self, output: Tensor, t: Any, x: Tensor, **options: Any) -> Any:
        answer = self.step(output, t, x, **options)
        self.first, self.last = x if self.first is None else self.first, answer[0]
        return answer


def parity(folder: Path, pipe: DiffcorePipeline) -> float:
    """Greatest difference between two samples of the stock pipeline in a folder and of our own loop, over their greatest value.

    It is loaded anew and called as a user calls it; ours asks about the levels that its scheduler named, begins with the same
    noise, and draws the same.
    """
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    stock = load(folder)
    stock.set_progress_bar_config(disable=True)
    recorded, labels = Recorded(stock.scheduler), _labels(pipe.process)
    steps = steps_of(stock.scheduler, pipe.config.num_inference_steps)
    target = family_of(pipe.network).export_target
    assert target is not None
    call = target.call_arguments(2, None if labels is None else labels.tolist())
    stock(**call, num_inference_steps=steps, generator=_generator(), output_type="np")
    assert recorded.first is not None
    assert recorded.last is not None
    ours = _ours(pipe.denoiser, stock.scheduler, recorded.first, labels)
    return float((ours - recorded.last).abs().max() / recorded.last.abs().max())


def check(folder: Path, pipe: DiffcorePipeline) -> float:
    """`parity`, where it is within the tolerance.

    Raises:
        ValueError: it is not.
    """
    found = parity(folder, pipe)
    if not found <= TOLERANCE:  # NaN too
        raise ValueError(
            f"samples of the stock pipeline differ from our own by {found:.3g} of their greatest value, expected at most "
            f"{TOLERANCE:g}: {ALTERNATIVE}"
        )
    return found


def steps_of(scheduler: Any, steps: int) -> int:
    """The most steps, at most these, with which it is right: of DDIM those that divide T, for it goes to t - T // n."""
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
    noise = Drawn(
        torch.zeros(len(x), dtype=torch.int64), process.shape, x.device, generator=_generator()
    )
    noise.start()  # as the pipeline drew its first x
    sampler = DDPM() if isinstance(scheduler, diffusers.DDPMScheduler) else DDIM()
    labels = None if labels is None else labels.to(x.device)
    knots = (*levels, process.schedule.at(math.inf))
    with torch.no_grad(), evaluation_mode(denoiser):
        return integrate(
            Denoiser(denoiser.network, process), sampler, x, knots, noise, condition=labels
        )[0]


def _kept(process: Process) -> Process:
    """The process in the scaling in which the scheduler keeps x: EDM's is ve, and an edm network is asked the same in any."""
    if process.prediction != "edm" or process.schedule.scaling == "ve":
        return process
    return replace(process, schedule=Rescaled(process.schedule, "ve"))
