"""Noise schedules, their transforms, and the grids of knots that samplers visit."""

from diffcore.schedules.base import Level, Real, Scaling, Schedule, alpha_sigma
from diffcore.schedules.curves import Beta, Mode, PowerCosine, Sigmoid
from diffcore.schedules.diffusers_config import from_diffusers
from diffcore.schedules.discrete import Discrete
from diffcore.schedules.grids import Even, Explicit, Grid, Within, check_falling
from diffcore.schedules.grids_in_level import AlignYourSteps, Karras, UniformBlend, UniformLogSNR
from diffcore.schedules.grids_in_time import BetaSpacing, Leading, Linspace, Quadratic, Trailing
from diffcore.schedules.quantile import Cauchy, Cosine, Flow, Laplace, LogLinear, Normal, Rho
from diffcore.schedules.transforms import (
    Interpolated,
    Mixture,
    Rescaled,
    Shifted,
    Truncated,
    ZeroTerminalSNR,
)

__all__ = [
    "AlignYourSteps",
    "Beta",
    "BetaSpacing",
    "Cauchy",
    "Cosine",
    "Discrete",
    "Even",
    "Explicit",
    "Flow",
    "Grid",
    "Interpolated",
    "Karras",
    "Laplace",
    "Leading",
    "Level",
    "Linspace",
    "LogLinear",
    "Mixture",
    "Mode",
    "Normal",
    "PowerCosine",
    "Quadratic",
    "Real",
    "Rescaled",
    "Rho",
    "Scaling",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "Trailing",
    "Truncated",
    "UniformBlend",
    "UniformLogSNR",
    "Within",
    "ZeroTerminalSNR",
    "alpha_sigma",
    "check_falling",
    "from_diffusers",
]
