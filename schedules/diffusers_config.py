"""The noise schedule of a diffusers scheduler, from its scheduler_config.json.

Only the noise levels are read here. How a scheduler samples (spacing, solver, Karras or beta
sigmas, shift_terminal, clipping) is expressed by a grid and a sampler; the prediction type and the
time conditioning belong to the Process.

The levels of some schedulers (0.42.1) differ from their definition. This module follows the
definition; a test measures each difference:

- laplace returns α as ᾱ, so that its median λ is 0.88. This module returns `Laplace(0, 0.5)`. The
  levels of a network that was trained on the table of diffusers are
  `Discrete(tuple(scheduler.betas.tolist()))`.
- Euler, EulerAncestral, DPMSolverMultistep and UniPC with rescale_betas_zero_snr set ᾱ_T = 2^-24
  (λ = -16.6), where the other schedulers and this module have 0 (λ = -inf).
- The flow schedulers shift σ_min twice, so that set_timesteps ends at another level (0.00892
  instead of 0.00299 for shift 3). `DiffcoreScheduler.from_config` follows set_timesteps.
- The tables are float32: ᾱ is right to 6e-7, and λ to 1e-3 at the clean end. Here they are float64.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffcore.schedules.base import Scaling, Schedule
from diffcore.schedules.beta_tables import Discrete
from diffcore.schedules.distributions import Cosine, Flow, Laplace, LogLinear, Rho
from diffcore.schedules.transforms import Shifted
from diffcore.schedules.zero_terminal_snr import ZeroTerminalSNR

__all__ = ["ANGLES", "FLOWS", "REFUSED", "SIGMAS", "TABLES", "schedule_from_diffusers"]

Config = Mapping[str, Any]

DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
LDM = {"beta_start": 0.00085, "beta_end": 0.012}

# The classes of diffusers 0.42.1, with the default values of keys that a config omits.
TABLES: dict[str, dict[str, Any]] = {
    "CogVideoXDDIMScheduler": LDM | {"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0},
    "CogVideoXDPMScheduler": LDM | {"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0},
    "ConsistencyDecoderScheduler": {
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 1024,
    },
    "DDIMInverseScheduler": DDPM,
    "DDIMParallelScheduler": DDPM,
    "DDIMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DDPMScheduler": DDPM,
    "DEISMultistepScheduler": DDPM,
    "DPMSolverMultistepInverseScheduler": DDPM,
    "DPMSolverMultistepScheduler": DDPM,
    "DPMSolverSDEScheduler": DDPM | LDM,
    "DPMSolverSinglestepScheduler": DDPM,
    "EulerAncestralDiscreteScheduler": DDPM,
    "EulerDiscreteScheduler": DDPM,
    "HeunDiscreteScheduler": DDPM | LDM,
    "KDPM2AncestralDiscreteScheduler": DDPM | LDM,
    "KDPM2DiscreteScheduler": DDPM | LDM,
    "LCMScheduler": LDM | {"beta_schedule": "scaled_linear"},
    "LMSDiscreteScheduler": DDPM,
    "PNDMScheduler": DDPM,
    "RePaintScheduler": DDPM,
    "SASolverScheduler": DDPM,
    "TCDScheduler": LDM | {"beta_schedule": "scaled_linear"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": DDPM,
}
"""Schedulers with a beta table."""
FLOWS: dict[str, dict[str, Any]] = {
    "FlowMapEulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "HeliosDMDScheduler": {"stages": 3, "time_shift_type": "linear"},
    "HeliosScheduler": {"stages": 3},
    "LTXEulerAncestralRFScheduler": {},
    "MiniMaxH3Scheduler": {"shift": 12.0},
    "PiflowScheduler": {"shift": 5.0},
    "RFD4ProteinaScheduler": {},
}
"""Flow schedulers."""
ANGLES: dict[str, Scaling] = {
    "CosineDPMSolverMultistepScheduler": "ve",
    "IPNDMScheduler": "vp",
    "SCMScheduler": "vp",
}
"""Schedulers on the cosine schedule, with the scaling of each."""
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_schedule": "karras"}
SIGMAS: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "KarrasVeScheduler": {"sigma_min": 0.02, "sigma_max": 100.0, "sigma_schedule": "exponential"},
    "ScoreSdeVeScheduler": {
        "sigma_min": 0.01,
        "sigma_max": 1348.0,
        "sigma_schedule": "exponential",
    },
}
"""Schedulers of σ/α between two bounds."""
REFUSED = {
    "DDPMWuerstchenScheduler": "its clamped continuous cosine is not available; "
    "PowerCosine(s/(1+s)) is the unclamped one",
    "ScoreSdeVpScheduler": "the continuous VP SDE is not available; "
    "Discrete() is its table of 1000 levels",
} | dict.fromkeys(
    (
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    ),
    "it masks or replaces discrete tokens, which have no x = α x_0 + σ ε",
)
"""Schedulers that have no schedule here, with the reason."""
UNKNOWN = (
    "expected a scheduler of diffusers 0.42; for another pass its betas to Discrete, or choose a "
    "schedule"
)


def schedule_from_diffusers(config: Config, mu: float | None = None) -> Schedule:
    """Build the schedule of a diffusers scheduler (0.42.1) from its scheduler_config.json.

    - Tables (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC, DEIS, LCM, TCD ...): `Discrete` in the vp
      scaling, from linear, scaled_linear, squaredcos_cap_v2, sigmoid, exp (ᾱ = e^(-12 t)) or
      trained_betas; timestep i is at t = (i+1)/T. rescale_betas_zero_snr is `ZeroTerminalSNR`;
      CogVideoX's snr_shift_scale s is a shift of -ln s before it.
    - Flows, σ = s τ / (1 + (s-1) τ): `Flow` shifted by -2 ln s. s is the `shift`; with
      use_flow_sigmas the `flow_shift`; with use_dynamic_shifting e^mu (time_shift_type
      exponential: Flux) or mu (linear). The T levels of diffusers are at t = τ = (i+1)/T; here t is
      continuous. The time input of the network is T σ = T a, not T t (MiniMax-H3, RFD4 and Mochi:
      1 - a).
    - Angles (IPNDM, SCM, Stable Audio's CosineDPMSolver): `Cosine`, at t = 2/π atan(σ/α).
    - σ/α between bounds, in the ve scaling: `Rho` for the karras sigma_schedule of EDM, consistency
      models and continuous Euler (Stable Video Diffusion), `LogLinear` for exponential, ScoreSdeVe
      and KarrasVe. These are the range and the spacing of sampling; no config contains the
      distribution of training (EDM's is Normal(2.4, 2.4)).

    Args:
        config: `json.load` of the file, or `json.loads(scheduler.to_json_string())`; missing keys
            have the defaults of the class.
        mu: μ of the dynamic shift, which the pipeline computes from the image size; required with
            use_dynamic_shifting, else None.

    Returns:
        The schedule; its scaling is the one that the scheduler samples in.

    Raises:
        ValueError: The class or its form of betas has no schedule here, or `mu` is missing or
            superfluous. The message contains the remedy.

    Example:
        >>> schedule_from_diffusers({"_class_name": "DDPMScheduler", "num_train_timesteps": 100})
        Discrete(betas='linear', steps=100, start=0.0001, end=0.02, scaling='vp')
    """
    name = config.get("_class_name")
    flow = name in FLOWS or (name in TABLES and bool(config.get("use_flow_sigmas")))
    if mu is not None and not (flow and config.get("use_dynamic_shifting")):
        raise ValueError(
            f"mu is {mu}, but the config of {name} does not set use_dynamic_shifting: leave mu out"
        )
    if name in FLOWS:
        return _flow(FLOWS[name] | dict(config), mu)
    if flow:
        return _flow(dict(config) | {"shift": config.get("flow_shift", 1.0)}, mu)
    if name in ANGLES:
        return Cosine(scaling=ANGLES[name])
    if name in SIGMAS or _is_continuous(config):
        return _sigmas(
            SIGMAS.get(str(name), EDM | {"sigma_schedule": _spacing(config)}) | dict(config)
        )
    if name in TABLES:
        return _rescaled(TABLES[name] | dict(config))
    raise ValueError(f"_class_name is {name!r}: {REFUSED.get(str(name), UNKNOWN)}")


def _is_continuous(config: Config) -> bool:
    """True if an Euler scheduler ignores its betas for the levels of EDM (SVD, CosXL)."""
    return config.get("timestep_type") == "continuous" and None not in (
        config.get("sigma_min"),
        config.get("sigma_max"),
    )


def _spacing(config: Config) -> str:
    return "exponential" if config.get("use_exponential_sigmas") else "karras"


def _sigmas(config: Config) -> Schedule:
    if config["sigma_schedule"] == "exponential":
        return LogLinear.ve(config["sigma_min"], config["sigma_max"])
    return Rho(config["sigma_min"], config["sigma_max"], config["rho"])


def _flow(config: Config, mu: float | None) -> Schedule:
    if (stages := config.get("stages", 1)) != 1:
        raise ValueError(
            f"stages is {stages}, expected 1: each resolution of a pyramid has its own levels"
        )
    s = (
        _dynamic_shift(config, mu)
        if config.get("use_dynamic_shifting")
        else config.get("shift", 1.0)
    )
    if not 0 < s < math.inf:
        raise ValueError(f"the time shift is {s}, expected a positive finite number")
    return Flow() if s == 1 else Shifted(Flow(), -2 * math.log(s))


def _dynamic_shift(config: Config, mu: float | None) -> float:
    if mu is None:
        raise ValueError(
            "use_dynamic_shifting is set: give mu, the μ that the pipeline computes from the image "
            "size"
        )
    match form := config.get("time_shift_type", "exponential"):
        case "exponential":
            return math.exp(mu)
        case "linear":
            return mu
    raise ValueError(f"time_shift_type is {form!r}, expected exponential or linear")


def _rescaled(config: Config) -> Schedule:
    schedule = _table(config)
    if (s := config.get("snr_shift_scale", 1.0)) != 1:
        schedule = Shifted(schedule, -math.log(s))
    return ZeroTerminalSNR(schedule) if config.get("rescale_betas_zero_snr") else schedule


def _table(config: Config) -> Schedule:
    if (betas := config.get("trained_betas")) is not None:
        return Discrete(tuple(betas), config.get("num_train_timesteps"))
    T = config.get("num_train_timesteps", 1000)
    match form := config["beta_schedule"]:
        case "linear" | "scaled_linear" | "sigmoid":
            return Discrete(form, T, config["beta_start"], config["beta_end"])
        case "squaredcos_cap_v2":
            return Discrete("cosine", T)
        case "exp":
            beta = -math.expm1(-12 / T)
            return Discrete("linear", T, beta, beta)
        case "laplace":
            return Laplace()
    raise ValueError(
        f"beta_schedule is {form!r}, expected linear, scaled_linear, squaredcos_cap_v2, sigmoid, "
        "exp or laplace"
    )
