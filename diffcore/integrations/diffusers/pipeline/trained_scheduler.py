"""The scheduler that is written beside a fine-tuned network."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
from torch import nn

from diffcore.core.prediction import PredictionType
from diffcore.core.process import Process, TimeConditioning
from diffcore.integrations.diffusers.families import family_of
from diffcore.integrations.diffusers.pipeline.export import (
    export_consistency_scheduler,
    export_scheduler,
)
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    describe_process,
    dynamic_shift,
)
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.samplers import DDIM, Consistency
from diffcore.schedules import Schedule, Trailing

__all__ = ["build_scheduler"]


def build_scheduler(
    config: Mapping[str, Any], process: Process, network: nn.Module | None = None
) -> Any:
    """Build the scheduler of a fine-tuned network.

    It is the scheduler of the pipeline if this describes the process (a flow), else the one of
    diffusers that expresses the process, else a DiffcoreScheduler. A DDIM scheduler of diffusers
    starts at the last level (trailing) and ends at the clean level, which zero terminal SNR
    requires. That of a consistency network is LCMScheduler.

    Args:
        config: config of the pipeline's scheduler.
        process: process that the network was trained on.
        network: the network, whose number of tokens determines the shift of a flow with
            `use_dynamic_shifting`, and whose time may be a multiple of the scheduler's.

    Returns:
        The scheduler.
    """
    if process.estimate == "consistency":
        return _build_consistency_scheduler(process)
    if process.prediction == "flow_prediction" and _describes(config, process, network):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    description = _describe(process)
    try:
        scheduler = export_scheduler(
            process, SchedulerSettings(DDIM(), Trailing(), *description), 1
        )
    except ValueError:
        return DiffcoreScheduler(DDIM(), Trailing(), *description)
    return _with_offset(scheduler)


def _build_consistency_scheduler(process: Process) -> Any:
    """LCMScheduler, or if it does not express the process, a DiffcoreScheduler."""
    try:
        return _with_offset(export_consistency_scheduler(process))
    except ValueError:
        return DiffcoreScheduler(Consistency(), Trailing(), *_describe(process))


def _describe(process: Process) -> tuple[Schedule, PredictionType, TimeConditioning, float]:
    """The arguments of a DiffcoreScheduler that the process determines."""
    return process.schedule, process.prediction, process.time, process.sigma_data


def _with_offset(scheduler: Any) -> Any:
    """The scheduler with the steps_offset that a StableDiffusionPipeline requires."""
    if "steps_offset" in scheduler.config:
        # Trailing spacing and LCMScheduler ignore it.
        scheduler.register_to_config(steps_offset=1)
    return scheduler


def _describes(config: Mapping[str, Any], process: Process, network: nn.Module | None) -> bool:
    """Whether a scheduler has the process, at the time shift of its shape if it is dynamic."""
    mu, factor = None, 1.0
    if network is not None:
        family = family_of(network)
        factor, tokens = family.time_scale(network), family.token_count(network, process.shape)
        if config.get("use_dynamic_shifting") and tokens is not None:
            mu = dynamic_shift(dict(config), tokens)
    try:
        found = describe_process(dict(config), mu)
    except ValueError:  # a dynamic shift needs μ
        return False
    time = replace(found.time, scale=found.time.scale * factor)
    return (found.schedule, found.prediction, time) == (
        process.schedule,
        process.prediction,
        process.time,
    )
