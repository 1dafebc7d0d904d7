"""What a diffusers scheduler's config says of the process: noise levels, what the network outputs, how it is told the level.

    table (DDPM, DDIM, Euler, DPM-Solver ...)    prediction_type             index i of T = num_train_timesteps
    flow (FlowMatchEuler ..., use_flow_sigmas)   flow_prediction             T a, a = σ/(α+σ)
    EDM (EDMEuler, EDMDPMSolverMultistep)        edm (prediction epsilon)    ln(σ/α)/4
    continuous Euler (SVD, CosXL)                v_prediction                ln(σ/α)/4

A table's network is asked about x of the vp process, also by schedulers that keep y = x/α (Euler, Heun, LMS).
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers

from diffcore.core.prediction import PredictionType
from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers.scheduler.settings import Settings
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

Config = Mapping[str, Any]
C_NOISE = TimeConditioning("logsnr", -1 / 8)
BACKWARD = ("MiniMaxH3Scheduler", "RFD4ProteinaScheduler")
"""Flows whose networks are told 1 - a."""
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


class Described(NamedTuple):
    """What a scheduler's config says of the process.

    Args:
        schedule: the noise levels.
        prediction: what the network outputs.
        time: how it is told the level.
        sigma_data: standard deviation of the data, where it is said.
    """

    schedule: Schedule
    prediction: PredictionType
    time: TimeConditioning
    sigma_data: float | None = None


def config_of(scheduler: Any) -> dict[str, Any]:
    """The config of a scheduler, or a config as it is, with the name of its class.

    `scheduler.config` of a scheduler that was made in Python holds every value and no name: any class of its family will do.
    """
    if isinstance(scheduler, Mapping):
        config = dict(scheduler)
        return config if "_class_name" in config else config | {"_class_name": _family(config)}
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


def describe(config: Config, mu: float | None = None) -> Described:
    """The process that a scheduler's config describes.

    Raises:
        ValueError: what it says contradicts itself, or is not enough; the message has the remedy.
    """
    if "sampler" in config:  # a DiffcoreScheduler's
        own = Settings.read(
            {name: config[name] for name in Settings.__dataclass_fields__ if name in config}
        )
        if config.get("use_dynamic_shifting"):
            own = _shifted(own, config, mu)
        return Described(own.schedule, own.prediction_type, own.time, own.sigma_data)
    name, schedule = str(config.get("_class_name")), schedule_from_diffusers(config, mu)
    if name in FLOWS or config.get("use_flow_sigmas"):
        _check_flow(config, name)
        return Described(schedule, "flow_prediction", TimeConditioning("blend", _entries(config)))
    if name in EDM:
        return _edm(config, schedule)
    if schedule.scaling == "ve" and config.get("timestep_type") == "continuous":
        return _continuous(config, schedule)
    if name not in TABLES or schedule.scaling != "vp":
        raise ValueError(
            f"{name} does not say what the network outputs or how it is told the level: pass the network with schedule, "
            f"prediction and time, as diffcore.core.process.Process describes them"
        )
    return Described(schedule, _of_table(config, name), TimeConditioning("index", _entries(config)))


def _shifted(own: Settings, config: Config, mu: float | None) -> Settings:
    if mu is None:
        raise ValueError(
            "use_dynamic_shifting is set: give mu, the μ that the pipeline computes from the image's size"
        )
    return own.shifted(mu, config.get("time_shift_type", "exponential"))


def _entries(config: Config) -> float:
    """T, the number of training timesteps."""
    default = TABLES.get(str(config.get("_class_name")), {}).get("num_train_timesteps", 1000)
    return float(config.get("num_train_timesteps", default))


def _check_flow(config: Config, name: str) -> None:
    if name in BACKWARD or config.get("invert_sigmas"):
        raise ValueError(
            f"the network of this {name} is told 1 - σ/(α+σ), which no time conditioning here is"
        )
    if name in TABLES and (kind := config.get("prediction_type", "epsilon")) != "flow_prediction":
        raise ValueError(
            f"{name} has use_flow_sigmas, but prediction_type {kind!r}: a flow's network predicts flow_prediction; set one "
            f"of the two in its config"
        )


def _of_table(config: Config, name: str) -> PredictionType:
    match kind := config.get("prediction_type", "epsilon"):
        case "epsilon" | "sample" | "v_prediction":
            return kind
        case "flow_prediction":
            raise ValueError(
                f"{name} has prediction_type 'flow_prediction', but a table of betas: set use_flow_sigmas, or another type"
            )
    raise ValueError(
        f"prediction_type is {kind!r}, expected epsilon, sample, v_prediction or flow_prediction"
    )


def _edm(config: Config, schedule: Schedule) -> Described:
    if (kind := config.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(
            f"prediction_type is {kind!r}: an EDM network's output here is that of 'epsilon' (c_out above 0)"
        )
    return Described(schedule, "edm", C_NOISE, float(config.get("sigma_data", 0.5)))


def _continuous(config: Config, schedule: Schedule) -> Described:
    if (kind := config.get("prediction_type", "epsilon")) != "v_prediction":
        raise ValueError(
            f"prediction_type is {kind!r}, but timestep_type 'continuous' needs 'v_prediction'"
        )
    return Described(Rescaled(schedule, "vp"), "v_prediction", C_NOISE)


def _family(config: Config) -> str:
    if "beta_schedule" in config or "trained_betas" in config:
        return "DDPMScheduler"
    if "sigma_data" in config and "sigma_schedule" in config:
        return "EDMEulerScheduler"
    if "use_dynamic_shifting" in config or "shift" in config:
        return "FlowMatchEulerDiscreteScheduler"
    raise ValueError(
        f"the config ({', '.join(sorted(config)) or 'empty'}) names no scheduler: pass the scheduler itself, or its "
        f"config with _class_name"
    )


def shift_of(config: Config, tokens: int) -> float:
    """The μ of use_dynamic_shifting, linear in the number of tokens, as pipelines compute it (calculate_shift of Flux's)."""
    low, high, base, most = (config.get(name, default) for name, default in SHIFTS.items())
    return base + (most - base) * (tokens - low) / (high - low)


SHIFTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
PASSED_ON = ("time_shift_type", *SHIFTS)


def settings_of(config: Config) -> dict[str, Any]:
    """The arguments of a DiffcoreScheduler for the config of one of diffusers': its process, spacing, end and clipping.

    Spacing leading, trailing and linspace, beta, exponential and Karras levels are grids of ours; a scheduler that moves
    timesteps off its table only rounds where these do not. The sampler is DDIM, unless told otherwise.
    """
    config = _with_defaults(config)
    dynamic = bool(config.get("use_dynamic_shifting"))
    said = describe(config | ({"use_dynamic_shifting": False, "shift": 1.0} if dynamic else {}))
    fields: dict[str, Any] = {
        "schedule": said.schedule,
        "prediction_type": said.prediction,
        "time": said.time,
    }
    if said.sigma_data is not None:
        fields["sigma_data"] = said.sigma_data
    _check_expressible(config)
    end = {
        "last": _last(config, said.schedule),
        "clip": _clip(config),
        "grid": grid_of(config, said.schedule),
    }
    passed = {name: config[name] for name in PASSED_ON if config.get(name) is not None}
    return (
        fields
        | end
        | passed
        | {"use_dynamic_shifting": dynamic, "num_train_timesteps": int(_entries(config))}
    )


def _check_expressible(config: Config) -> None:
    for name, remedy in (
        ("thresholding", "clip to a fixed range (clip_sample), or leave it out"),
        ("shift_terminal", "take a grid whose last knot you choose, Within(Trailing(), high=λ)"),
    ):
        if config.get(name):
            raise ValueError(f"{name} is {config[name]}, which there is no part for here: {remedy}")


def grid_of(config: Config, schedule: Schedule) -> Grid:
    """The levels that a scheduler visits."""
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
    """σ/α of the noisiest level, not above it by rounding."""
    return math.exp(-_finite(lowest) / 2) * (1 - 1e-12)


def _finite(logsnr: float) -> float:
    if logsnr == -math.inf:
        raise ValueError(
            "the schedule ends at pure noise, where Karras and exponential levels cannot begin: pass a grid"
        )
    return logsnr


def _last(config: Config, schedule: Schedule) -> float | None:
    """λ of index 0 where a run ends there: set_alpha_to_one false, or final_sigmas_type sigma_min."""
    if config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min":
        return schedule.logsnr(1 / _entries(config))
    return None


def _clip(config: Config) -> float | None:
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _with_defaults(config: Config) -> dict[str, Any]:
    """The config, with what its class takes where it is silent."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = (
        inspect.signature(kind.__init__).parameters.values() if inspect.isclass(kind) else ()
    )
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config_of(config)
