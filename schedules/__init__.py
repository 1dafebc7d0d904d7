"""Noise schedules, their transforms, and the grids of knots that samplers visit."""

from diffcore.schedules.base import Level, Real, Scaling, Schedule, alpha_sigma
from diffcore.schedules.curves import Beta, Mode, PowerCosine, Sigmoid
from diffcore.schedules.diffusers_config import from_diffusers
from diffcore.schedules.discrete import Discrete
from diffcore.schedules.grids import Explicit, Grid, Karras, Linspace, Trailing, UniformLogSNR
from diffcore.schedules.quantile import Cauchy, Cosine, Flow, Laplace, LogLinear, Normal, Rho
from diffcore.schedules.transforms import Interpolated, Mixture, Rescaled, Shifted, Truncated, ZeroTerminalSNR

__all__ = [
    "Beta",
    "Cauchy",
    "Cosine",
    "Discrete",
    "Explicit",
    "Flow",
    "Grid",
    "Interpolated",
    "Karras",
    "Laplace",
    "Level",
    "Linspace",
    "LogLinear",
    "Mixture",
    "Mode",
    "Normal",
    "PowerCosine",
    "Real",
    "Rescaled",
    "Rho",
    "Scaling",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "Trailing",
    "Truncated",
    "UniformLogSNR",
    "ZeroTerminalSNR",
    "alpha_sigma",
    "from_diffusers",
]
