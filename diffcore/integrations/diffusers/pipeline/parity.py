"""Comparison of an exported pipeline with diffcore: both sample from the same noise."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.families.export_targets import ALTERNATIVE
from diffcore.integrations.diffusers.pipeline.pipeline import DiffcorePipeline
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise
from diffcore.samplers import DDIM, DDPM, Consistency, Sampler
from diffcore.sampling.generation import evaluation_mode
from diffcore.sampling.loop import integrate
from diffcore.schedules import Rescaled

__all__ = ["StepRecorder", "check_samples", "compare_samples", "find_exact_steps"]

TOLERANCE = 1e-4
"""Bound on the largest difference of samples, relative to the largest value."""
TABLES = (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.LCMScheduler)
"""Schedulers whose steps go between entries of a table."""


class StepRecorder:
    """Replaces the `step` of a scheduler, and records the first x and the last result.

    Args:
        scheduler: scheduler of diffusers.
    """

    def __init__(self, scheduler: Any) -> None:
        self.step = scheduler.step
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        scheduler.step = self

    def __call__(self, output: Tensor, t: Any, x: Tensor, **options: Any) -> Any:
        result = self.step(output, t, x, **options)
        self.first, self.last = x if self.first is None else self.first, result[0]
        return result


def compare_samples(folder: str | Path, pipe: DiffcorePipeline) -> float:
    """Compare two samples of an exported pipeline with those of the diffcore loop.

    The pipeline is loaded from its folder and called by its public interface. The loop evaluates
    the same levels with the same noise.

    Args:
        folder: folder of the exported pipeline.
        pipe: pipeline that was exported.

    Returns:
        The largest difference, relative to the largest value.
    """
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    exported = load(folder)
    exported.set_progress_bar_config(disable=True)
    recorder, labels = StepRecorder(exported.scheduler), _labels(pipe.process)
    steps = find_exact_steps(exported.scheduler, pipe.config.num_inference_steps)
    target = family_of(pipe.network).export_target
    assert target is not None
    call = target.call_arguments(2, None if labels is None else labels.tolist())
    exported(**call, num_inference_steps=steps, generator=_generator(), output_type="np")
    assert recorder.first is not None
    assert recorder.last is not None
    expected = _sample(pipe.denoiser, exported.scheduler, recorder.first, labels)
    return float((expected - recorder.last).abs().max() / recorder.last.abs().max())


def check_samples(folder: str | Path, pipe: DiffcorePipeline) -> float:
    """Compare the samples of an exported pipeline with those of the diffcore loop.

    Args:
        folder: folder of the exported pipeline.
        pipe: pipeline that was exported.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ValueError: The difference exceeds 1e-4.
    """
    difference = compare_samples(folder, pipe)
    if not difference <= TOLERANCE:  # NaN too
        raise ValueError(
            f"samples of the exported pipeline differ from those of diffcore by {difference:.3g} "
            f"of their largest value, expected at most {TOLERANCE:g}: {ALTERNATIVE}"
        )
    return difference


def find_exact_steps(scheduler: Any, steps: int) -> int:
    """The largest number of steps, at most `steps`, with which a scheduler of diffusers is exact.

    DDIM and DDPM step from t to t - T // n, which is the next timestep only if n divides T. LCM
    rounds its timesteps unless n divides T.

    Args:
        scheduler: scheduler of diffusers.
        steps: upper bound.

    Returns:
        The number of steps.
    """
    if not isinstance(scheduler, TABLES):
        return steps
    config: Any = scheduler.config  # type: ignore[union-attr]
    entries: int = config.num_train_timesteps
    return next(n for n in range(min(steps, entries), 0, -1) if entries % n == 0)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _labels(process: Process) -> Tensor | None:
    """The first and the last class, or None without classes."""
    return torch.tensor([0, process.classes - 1]) if process.classes else None


def _sample(denoiser: Denoiser, scheduler: Any, x: Tensor, labels: Tensor | None) -> Tensor:
    """Samples (B, *shape) of the diffcore loop at the levels of a diffusers scheduler, from x."""
    process = _scheduler_process(denoiser.process)
    times = [float(t) for t in scheduler.timesteps]
    levels = [process.time.level(process.schedule, time) for time in times]
    noise = GeneratorNoise.of(len(x), process.shape, x.device, _generator())
    noise.start()  # the pipeline has drawn its first x from an equal generator
    sampler: Sampler = DDIM()
    variance = scheduler.config.get("variance_type")
    if isinstance(scheduler, diffusers.DDPMScheduler):
        sampler = DDPM() if variance == "learned_range" else DDPM(0.0)
    if isinstance(scheduler, diffusers.LCMScheduler):
        sampler = Consistency()
    labels = None if labels is None else labels.to(x.device)
    knots = (*levels, process.schedule.at(math.inf))
    with torch.no_grad(), evaluation_mode(denoiser):
        return integrate(
            Denoiser(denoiser.network, process), sampler, x, knots, noise, condition=labels
        )[0]


def _scheduler_process(process: Process) -> Process:
    """The process in the scaling of the scheduler's x: ve for edm, whose network input is the same
    in every scaling.
    """
    if process.prediction != "edm" or process.schedule.scaling == "ve":
        return process
    return replace(process, schedule=Rescaled(process.schedule, "ve"))
