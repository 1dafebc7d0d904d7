"""The process that the config of a diffusers scheduler describes.

    scheduler                                    prediction type             time input
    table (DDPM, DDIM, Euler, DPM-Solver ...)    prediction_type             index i < T
    flow (FlowMatchEuler ..., use_flow_sigmas)   flow_prediction             T a, a = σ/(α+σ)
    EDM (EDMEuler, EDMDPMSolverMultistep)        edm (prediction epsilon)    ln(σ/α)/4
    continuous Euler (SVD, CosXL)                v_prediction                ln(σ/α)/4

T is num_train_timesteps. The network of a table is evaluated at x of the vp process, also by
schedulers that keep y = x/α (Euler, Heun, LMS).
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers

from diffcore.core.prediction import PredictionType
from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.schedules import (
    BetaSpacing,
    Grid,
    Karras,
    Leading,
    Linspace,
    Rescaled,
    Schedule,
    Trailing,
    UniformLogSNR,
    schedule_from_diffusers,
)
from diffcore.schedules.diffusers_config import FLOWS, TABLES

__all__ = [
    "C_NOISE",
    "Config",
    "ProcessDescription",
    "describe_process",
    "dynamic_shift",
    "grid_from_config",
    "read_config",
    "scheduler_arguments",
]

Config = Mapping[str, Any]
C_NOISE = TimeConditioning("logsnr", -1 / 8)
BACKWARD = ("MiniMaxH3Scheduler", "RFD4ProteinaScheduler")
"""Flows whose networks have the time input 1 - a."""
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


class ProcessDescription(NamedTuple):
    """The process of a scheduler's config.

    Args:
        schedule: noise schedule.
        prediction: output of the network.
        time: time conditioning of the network.
        sigma_data: standard deviation of the data; None if the config does not contain it.
    """

    schedule: Schedule
    prediction: PredictionType
    time: TimeConditioning
    sigma_data: float | None = None


def read_config(scheduler: Any) -> dict[str, Any]:
    """Read the config of a scheduler, with the name of its class.

    `scheduler.config` of a scheduler that was constructed in Python contains no class name. It gets
    the name of a class with the same options.

    Args:
        scheduler: scheduler of diffusers, or its config.

    Returns:
        A copy of the config with `_class_name`.

    Raises:
        ValueError: The config has no class name, and its options are those of no known scheduler.
    """
    if isinstance(scheduler, Mapping):
        config = dict(scheduler)
        return config if "_class_name" in config else config | {"_class_name": _family(config)}
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


def describe_process(config: Config, mu: float | None = None) -> ProcessDescription:
    """The process that a scheduler's config describes.

    Args:
        config: config with `_class_name`.
        mu: μ of a dynamic shift.

    Returns:
        The description of the process.

    Raises:
        ValueError: The config contradicts itself, or is incomplete; the message contains the
            remedy.
    """
    if "sampler" in config:  # a DiffcoreScheduler
        components = {
            name: config[name] for name in SchedulerSettings.__dataclass_fields__ if name in config
        }
        settings = SchedulerSettings.read(components)
        if config.get("use_dynamic_shifting"):
            settings = _shifted(settings, config, mu)
        return ProcessDescription(
            settings.schedule, settings.prediction_type, settings.time, settings.sigma_data
        )
    name, schedule = str(config.get("_class_name")), schedule_from_diffusers(config, mu)
    if name in FLOWS or config.get("use_flow_sigmas"):
        _check_flow(config, name)
        return ProcessDescription(
            schedule, "flow_prediction", TimeConditioning("blend", _entries(config))
        )
    if name in EDM:
        return _edm(config, schedule)
    if schedule.scaling == "ve" and config.get("timestep_type") == "continuous":
        return _continuous(config, schedule)
    if name not in TABLES or schedule.scaling != "vp":
        raise ValueError(
            f"{name} does not contain the prediction type or the time conditioning: pass the "
            "network with schedule, prediction and time, which diffcore.core.process.Process "
            "describes"
        )
    return ProcessDescription(
        schedule, _of_table(config, name), TimeConditioning("index", _entries(config))
    )


def _shifted(settings: SchedulerSettings, config: Config, mu: float | None) -> SchedulerSettings:
    if mu is None:
        raise ValueError(
            "use_dynamic_shifting is set: pass mu, the μ that the pipeline computes from the "
            "image's size"
        )
    return settings.shift(mu, config.get("time_shift_type", "exponential"))


def _entries(config: Config) -> float:
    """T, the number of training timesteps."""
    default = TABLES.get(str(config.get("_class_name")), {}).get("num_train_timesteps", 1000)
    return float(config.get("num_train_timesteps", default))


def _check_flow(config: Config, name: str) -> None:
    if name in BACKWARD or config.get("invert_sigmas"):
        raise ValueError(
            f"the network of this {name} has the time input 1 - σ/(α+σ), which no time "
            "conditioning here expresses"
        )
    if name in TABLES and (kind := config.get("prediction_type", "epsilon")) != "flow_prediction":
        raise ValueError(
            f"{name} has use_flow_sigmas, but prediction_type is {kind!r}: set prediction_type to "
            "flow_prediction, or leave use_flow_sigmas out"
        )


def _of_table(config: Config, name: str) -> PredictionType:
    match kind := config.get("prediction_type", "epsilon"):
        case "epsilon" | "sample" | "v_prediction":
            return kind
        case "flow_prediction":
            raise ValueError(
                f"{name} has prediction_type 'flow_prediction', but its noise levels are a table "
                "of betas: set use_flow_sigmas, or another prediction_type"
            )
    raise ValueError(
        f"prediction_type is {kind!r}, expected epsilon, sample, v_prediction or flow_prediction"
    )


def _edm(config: Config, schedule: Schedule) -> ProcessDescription:
    if (kind := config.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(
            f"prediction_type is {kind!r}, expected 'epsilon', the only one of an EDM network "
            "(c_out above 0)"
        )
    return ProcessDescription(schedule, "edm", C_NOISE, float(config.get("sigma_data", 0.5)))


def _continuous(config: Config, schedule: Schedule) -> ProcessDescription:
    if (kind := config.get("prediction_type", "epsilon")) != "v_prediction":
        raise ValueError(
            f"prediction_type is {kind!r}, expected 'v_prediction', which timestep_type "
            "'continuous' requires"
        )
    return ProcessDescription(Rescaled(schedule, "vp"), "v_prediction", C_NOISE)


def _family(config: Config) -> str:
    if "beta_schedule" in config or "trained_betas" in config:
        return "DDPMScheduler"
    if "sigma_data" in config and "sigma_schedule" in config:
        return "EDMEulerScheduler"
    if "use_dynamic_shifting" in config or "shift" in config:
        return "FlowMatchEulerDiscreteScheduler"
    raise ValueError(
        f"the config ({', '.join(sorted(config)) or 'empty'}) names no scheduler: pass the "
        "scheduler itself, or its config with _class_name"
    )


def dynamic_shift(config: Config, tokens: int) -> float:
    """μ of use_dynamic_shifting, linear in the number of tokens, as the Flux pipeline computes it.

    Args:
        config: config of the scheduler, with the two points of the line.
        tokens: number of image tokens.

    Returns:
        μ.
    """
    low, high, base, maximum = (
        config.get(name, default) for name, default in DEFAULT_SHIFTS.items()
    )
    return base + (maximum - base) * (tokens - low) / (high - low)


DEFAULT_SHIFTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""Defaults of the line through (tokens, μ) of a dynamic shift."""
SHIFT_OPTIONS = ("time_shift_type", *DEFAULT_SHIFTS)
"""Options of a dynamic shift, which have the same names in a DiffcoreScheduler."""


def scheduler_arguments(config: Config) -> dict[str, Any]:
    """The arguments of a DiffcoreScheduler that express the config of a diffusers scheduler.

    They define the process, the grid, the last level and the clipping. The spacings leading,
    trailing and linspace, and beta, exponential and Karras levels, become grids. The sampler is not
    read; the default is DDIM.

    Args:
        config: config with `_class_name`.

    Returns:
        Keyword arguments of DiffcoreScheduler.

    Raises:
        ValueError: The config has an option that cannot be expressed; the message contains the
            remedy.
    """
    config = _with_defaults(config)
    dynamic = bool(config.get("use_dynamic_shifting"))
    described = describe_process(
        config | ({"use_dynamic_shifting": False, "shift": 1.0} if dynamic else {})
    )
    _check_expressible(config)
    arguments: dict[str, Any] = {
        "schedule": described.schedule,
        "prediction_type": described.prediction,
        "time": described.time,
        "last": _last_logsnr(config, described.schedule),
        "clip": _clip(config),
        "grid": grid_from_config(config, described.schedule),
        "use_dynamic_shifting": dynamic,
        "num_train_timesteps": int(_entries(config)),
    }
    if described.sigma_data is not None:
        arguments["sigma_data"] = described.sigma_data
    return arguments | {
        name: config[name] for name in SHIFT_OPTIONS if config.get(name) is not None
    }


def _check_expressible(config: Config) -> None:
    for name, remedy in (
        ("thresholding", "clip to a fixed range (clip_sample), or leave it out"),
        ("shift_terminal", "take a grid whose last knot you choose, Within(Trailing(), high=λ)"),
    ):
        if config.get(name):
            raise ValueError(f"{name} is {config[name]}, which cannot be expressed: {remedy}")


def grid_from_config(config: Config, schedule: Schedule) -> Grid:
    """The grid of a scheduler's config.

    Args:
        config: config with `_class_name`.
        schedule: noise schedule of the config.

    Returns:
        The grid.
    """
    lowest, T = schedule.logsnr(1.0), _entries(config)
    highest = schedule.logsnr(1 / T)
    if config.get("use_karras_sigmas") or config.get("sigma_schedule") == "karras":
        return Karras(
            config.get("sigma_min") or math.exp(-highest / 2),
            config.get("sigma_max") or _ratio(lowest),
        )
    if (
        config.get("use_exponential_sigmas")
        or config.get("use_lu_lambdas")
        or "sigma_schedule" in config
    ):
        return UniformLogSNR(_finite(lowest), highest)
    if config.get("use_beta_sigmas"):
        return BetaSpacing()
    if config["_class_name"] in FLOWS:
        return Linspace(1 / T)
    match config.get("timestep_spacing", "linspace"):
        case "leading":
            return Leading(config.get("steps_offset", 0))
        case "trailing":
            return Trailing()
    return Linspace()


def _ratio(lowest: float) -> float:
    """σ/α of the noisiest level, lowered by a relative 1e-12 so that rounding cannot exceed it."""
    return math.exp(-_finite(lowest) / 2) * (1 - 1e-12)


def _finite(logsnr: float) -> float:
    if logsnr == -math.inf:
        raise ValueError(
            "the schedule ends at pure noise, where Karras and exponential levels are infinite: "
            "pass a grid"
        )
    return logsnr


def _last_logsnr(config: Config, schedule: Schedule) -> float | None:
    """λ of index 0 if sampling ends there (set_alpha_to_one false, or final_sigmas_type sigma_min),
    else None.
    """
    if config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min":
        return schedule.logsnr(1 / _entries(config))
    return None


def _clip(config: Config) -> float | None:
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _with_defaults(config: Config) -> dict[str, Any]:
    """The config completed by the defaults of its class."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = (
        inspect.signature(kind.__init__).parameters.values() if inspect.isclass(kind) else ()
    )
    return {p.name: p.default for p in parameters if p.default is not p.empty} | read_config(config)
