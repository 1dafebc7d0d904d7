"""Noise schedules, their transforms, and the grids of knots that samplers visit."""

from diffcore.schedules.base import Level, Real, Scaling, Schedule, alpha_sigma
from diffcore.schedules.beta_tables import Discrete
from diffcore.schedules.curves import Beta, Mode, PowerCosine, Sigmoid
from diffcore.schedules.diffusers_config import schedule_from_diffusers
from diffcore.schedules.distributions import Cauchy, Cosine, Flow, Laplace, LogLinear, Normal, Rho
from diffcore.schedules.grids import CoordinateGrid, Explicit, Grid, Within, check_falling
from diffcore.schedules.level_grids import AlignYourSteps, Karras, UniformBlend, UniformLogSNR
from diffcore.schedules.time_grids import BetaSpacing, Leading, Linspace, Quadratic, Trailing
from diffcore.schedules.transforms import (
    Interpolated,
    Mixture,
    Rescaled,
    Shifted,
    Truncated,
)
from diffcore.schedules.tuned_grid import Tuned
from diffcore.schedules.zero_terminal_snr import ZeroTerminalSNR

__all__ = [
    "AlignYourSteps",
    "Beta",
    "BetaSpacing",
    "Cauchy",
    "CoordinateGrid",
    "Cosine",
    "Discrete",
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
    "Tuned",
    "UniformBlend",
    "UniformLogSNR",
    "Within",
    "ZeroTerminalSNR",
    "alpha_sigma",
    "check_falling",
    "schedule_from_diffusers",
]
