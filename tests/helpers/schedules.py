"""Schedules and grids of every class of the package, with settings that the tests share."""

import inspect
import math
from typing import get_args

import pytest
import torch

import diffcore.schedules
from diffcore.schedules import (
    AlignYourSteps,
    Beta,
    BetaSpacing,
    Cauchy,
    CoordinateGrid,
    Cosine,
    Discrete,
    Explicit,
    Flow,
    Grid,
    Interpolated,
    Karras,
    Laplace,
    Leading,
    Linspace,
    LogLinear,
    Mixture,
    Mode,
    Normal,
    PowerCosine,
    Quadratic,
    Rescaled,
    Rho,
    Scaling,
    Schedule,
    Shifted,
    Sigmoid,
    Trailing,
    Truncated,
    Tuned,
    UniformBlend,
    UniformLogSNR,
    Within,
    ZeroTerminalSNR,
)

SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
STABLE_DIFFUSION = Discrete("scaled_linear", 1000, 0.00085, 0.012)

SCHEDULES: list[Schedule] = [
    Beta(),
    Beta(0.5, 2.0, scaling="vp"),
    Cauchy(0.5, 0.7),
    Cosine(),
    Cosine(1.0, 2.0, scaling="flow"),
    Discrete(),
    STABLE_DIFFUSION,
    Discrete("cosine", 50),
    Flow(),
    Interpolated(Cosine(), 1.0, -2.0),
    Interpolated(Discrete("cosine", 50), -1.0, 0.5),
    Laplace(),
    Laplace(1.0, 0.75, scaling="flow"),
    LogLinear(),
    LogLinear.ve(),
    Mixture(Laplace()),
    Mixture(Normal(scaling="flow"), Cauchy(1.0), 0.4),
    Mode(),
    Mode(-0.9, scaling="vp"),
    Normal(),
    Normal(2.4, 2.4, scaling="ve"),
    PowerCosine(0.2, 1.0, 1.5),
    PowerCosine(0.1, 0.8, 0.5, scaling="flow"),
    Rescaled(Cosine(), "flow"),
    Rho(),
    Shifted(Cosine(), -2 * math.log(3)),
    Shifted(Discrete(), 1.5),
    Sigmoid(),
    Sigmoid(0.0, 3.0, 0.3, scaling="ve"),
    Truncated(Cauchy(), -8.0, 9.0),
    ZeroTerminalSNR(Cosine()),
    ZeroTerminalSNR(Discrete()),
    ZeroTerminalSNR(Shifted(Discrete("cosine"), -1.0)),
]
"""Schedules of every class, in alphabetical order of the classes."""

TRANSFORMS = [schedule for schedule in SCHEDULES if hasattr(schedule, "inner")]
"""Schedules of every class that transforms an inner schedule."""

UNIFORM_GRIDS: list[CoordinateGrid] = [
    AlignYourSteps(),
    AlignYourSteps((10.0, 1.0, 0.01)),
    BetaSpacing(),
    Karras(sigma_max=14.0),
    Leading(),
    Linspace(),
    Quadratic(),
    Trailing(),
    UniformBlend(),
    UniformLogSNR(-5.0, 8.0),
]
"""Grids that are uniform in a coordinate, with bounds within the levels of Stable Diffusion."""

GRIDS: list[Grid] = [
    *UNIFORM_GRIDS,
    Explicit((-3.0, 0.0, math.inf)),
    Tuned((-3.0, 0.0, math.inf), Trailing(), "DDIM()", "CFG(scale=3.0)"),
    Within(Within(BetaSpacing(2.0, 0.5), -3.0), high=2.0),
]
"""Grids of every class."""

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
all_scalings = pytest.mark.parametrize("scaling", SCALINGS)


def concrete_classes(base: type) -> list[type]:
    """The concrete subclasses of `base` in `diffcore.schedules`, in alphabetical order."""
    exported = (getattr(diffcore.schedules, name) for name in sorted(diffcore.schedules.__all__))
    return [
        value
        for value in exported
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    ]


def index_times(steps: int) -> torch.Tensor:
    """The times (i+1)/T of the T indices of a table, float64 of shape (T,)."""
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps
