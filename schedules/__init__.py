"""Noise schedules, their transforms, and the grids of knots that samplers visit."""

from diffcore.schedules.base import Level, Real, Scaling, Schedule, alpha_sigma
from diffcore.schedules.diffusers_config import from_diffusers
from diffcore.schedules.discrete import Discrete
from diffcore.schedules.grids import Explicit, Grid, Karras, Linspace, Trailing, UniformLogSNR
from diffcore.schedules.quantile import Cosine, Flow, Laplace, Normal
from diffcore.schedules.transforms import Shifted, Truncated, ZeroTerminalSNR

__all__ = [
    "Cosine",
    "Discrete",
    "Explicit",
    "Flow",
    "Grid",
    "Karras",
    "Laplace",
    "Level",
    "Linspace",
    "Normal",
    "Real",
    "Scaling",
    "Schedule",
    "Shifted",
    "Trailing",
    "Truncated",
    "UniformLogSNR",
    "ZeroTerminalSNR",
    "alpha_sigma",
    "from_diffusers",
]
