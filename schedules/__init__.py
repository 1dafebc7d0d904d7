"""Noise schedules, their transforms, and the grids of knots that samplers visit."""

from diffcore.schedules.base import Level, Real, Scaling, Schedule, alpha_sigma
from diffcore.schedules.discrete import Discrete
from diffcore.schedules.grids import Even, Explicit, Grid, Within, check_falling
from diffcore.schedules.grids_in_level import AlignYourSteps, Karras, UniformBlend, UniformLogSNR
from diffcore.schedules.grids_in_time import Beta, Leading, Linspace, Quadratic, Trailing
from diffcore.schedules.quantile import Cosine, Flow, Laplace, Normal
from diffcore.schedules.transforms import Shifted, Truncated, ZeroTerminalSNR

__all__ = [
    "AlignYourSteps",
    "Beta",
    "Cosine",
    "Discrete",
    "Even",
    "Explicit",
    "Flow",
    "Grid",
    "Karras",
    "Laplace",
    "Leading",
    "Level",
    "Linspace",
    "Normal",
    "Quadratic",
    "Real",
    "Scaling",
    "Schedule",
    "Shifted",
    "Trailing",
    "Truncated",
    "UniformBlend",
    "UniformLogSNR",
    "Within",
    "ZeroTerminalSNR",
    "alpha_sigma",
    "check_falling",
]
