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
from collections.abc import Callable, Container, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import diffusers

from diffcore.core.prediction import PredictionType
from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers.scheduler.scheduler_grid import grid_from_config
from diffcore.integrations.diffusers.scheduler.settings import (
    SchedulerSettings,
    apply_dynamic_shift,
)
from diffcore.io.specs import from_spec
from diffcore.schedules import Rescaled, Schedule, schedule_from_diffusers
from diffcore.schedules.diffusers_config import FLOWS, SIGMAS, TABLES

__all__ = [
    "C_NOISE",
    "DISTILLED",
    "Config",
    "ProcessDescription",
    "describe_process",
    "dynamic_shift",
    "read_scheduler_config",
    "scheduler_arguments",
]

Config = Mapping[str, Any]
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers of consistency models, which jump to x_0 in each step."""
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


def read_scheduler_config(scheduler: Any) -> dict[str, Any]:
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
        settings = apply_dynamic_shift(from_spec(SchedulerSettings, components), config, mu)
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
    """The class whose constructor has the options of a config, else one with such noise levels.

    Of classes with equal options, which list equal levels, it is the one with the shortest name.
    """
    options = {name for name in config if not name.startswith("_")}
    names = [
        name
        for name in (*TABLES, *FLOWS, *SIGMAS)
        if options == {p.name for p in _parameters(name)}
    ]
    if names and "FlowMapEulerDiscreteScheduler" not in names:
        return min(names, key=len)
    if names:
        raise ValueError(
            f"the config is one of {' or '.join(names)}, whose levels differ: pass the scheduler "
            "itself, or its config with _class_name"
        )
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


def scheduler_arguments(config: Config, given: Container[str] = ()) -> dict[str, Any]:
    """The arguments of a DiffcoreScheduler that express the config of a diffusers scheduler.

    They define the process, the grid, the last level and the clipping. The sampler is not read; the
    default is DDIM.

    Args:
        config: config with `_class_name`.
        given: names of arguments that the caller defines, which are not read from the config.

    Returns:
        Keyword arguments of DiffcoreScheduler without those in `given`.

    Raises:
        ValueError: The config has an option that cannot be expressed; the message contains the
            remedy.
    """
    config = _with_defaults(config)
    dynamic = bool(config.get("use_dynamic_shifting"))
    unshifted = {"use_dynamic_shifting": False, "shift": 1.0, "flow_shift": 1.0}
    describe = cache(lambda: describe_process(config | (unshifted if dynamic else {})))
    if config["_class_name"] in DISTILLED and not ("sampler" in given and "grid" in given):
        raise ValueError(
            f"{config['_class_name']} samples a distilled network in a few steps by a rule of its "
            "own: keep this scheduler, or pass both sampler and grid, such as "
            "sampler=Consistency() and grid=Trailing()"
        )
    readers: dict[str, Callable[[], Any]] = {
        "schedule": lambda: describe().schedule,
        "prediction_type": lambda: describe().prediction,
        "time": lambda: describe().time,
        "sigma_data": lambda: None if "prediction_type" in given else describe().sigma_data,
        "last": lambda: _last_logsnr(config, lambda: describe().schedule),
        "clip": lambda: _clip(config),
        "grid": lambda: grid_from_config(config, describe().schedule),
        "variance_type": lambda: _variance_type(config),
        "use_dynamic_shifting": lambda: dynamic,
        "num_train_timesteps": lambda: int(_entries(config)),
    } | {name: partial(config.get, name) for name in SHIFT_OPTIONS}
    arguments = {name: read() for name, read in readers.items() if name not in given}
    optional = ("sigma_data", *SHIFT_OPTIONS)
    return {
        name: value
        for name, value in arguments.items()
        if value is not None or name not in optional
    }


def _last_logsnr(config: Config, schedule: Callable[[], Schedule]) -> float | None:
    """λ of index 0 if sampling ends there (set_alpha_to_one false, or final_sigmas_type sigma_min),
    else None.
    """
    if config.get("final_sigmas_type") == "sigma_min" and (
        config["_class_name"] in EDM or config.get("use_flow_sigmas")
    ):
        raise ValueError(
            f"final_sigmas_type is 'sigma_min', for which {config['_class_name']} repeats its last "
            "level: pass last=None to end at clean data, or the λ to end at"
        )
    if config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min":
        return schedule().logsnr(1 / _entries(config))
    return None


def _variance_type(config: Config) -> str:
    """The variance of the network's output; a sampler here chooses between fixed variances."""
    kind = str(config.get("variance_type"))
    if kind == "learned":
        raise ValueError(
            "variance_type is 'learned', the logarithm of a variance, which is not supported: pass "
            "variance_type='fixed', which leaves the variance out"
        )
    return "learned_range" if kind == "learned_range" else "fixed"


def _clip(config: Config) -> float | None:
    if config.get("thresholding"):
        raise ValueError(
            "thresholding is True, and a DiffcoreScheduler clamps to a fixed range: pass clip=1.0, "
            "or clip=None for no bound"
        )
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _with_defaults(config: Config) -> dict[str, Any]:
    """The config completed by the defaults of its class."""
    config = read_scheduler_config(config)
    parameters = _parameters(config["_class_name"])
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config


def _parameters(class_name: Any) -> list[inspect.Parameter]:
    """The options of a scheduler of diffusers; none if diffusers has no such class."""
    kind = getattr(diffusers, str(class_name), None)
    return list(inspect.signature(kind).parameters.values()) if inspect.isclass(kind) else []
