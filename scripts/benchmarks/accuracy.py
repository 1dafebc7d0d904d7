"""How close samplers come to the exact flow for a number of network evaluations, by oracles whose denoiser is exact.

Every run begins on one trajectory, at λ of DDPM's linear table's last entry (σ/α = 157), and ends at clean data; what begins at
more noise, as flow-matching schedulers do at α = 0, begins on the same trajectory there. So all are to reach one x_0, and the
measure is their distance to it. A sampler has the most steps that its evaluations allow.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.oracle import Empirical, GaussianMixture, Oracle
from diffcore.core.process import Process
from diffcore.samplers import (
    DDIM,
    AdamsBashforth,
    AdamsMoulton,
    AlphaBlending,
    DPMSolverPP,
    GradientEstimation,
    Heun,
    Sampler,
    UniPC,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import (
    AlignYourSteps,
    BetaSpacing,
    CoordinateGrid,
    Cosine,
    Discrete,
    Karras,
    Level,
    Quadratic,
    Schedule,
    Trailing,
    UniformBlend,
    UniformLogSNR,
    Within,
)
from diffcore.training.data import Digits

COUNTS = (5, 8, 10, 15, 20, 30, 50)
START = Discrete().logsnr(1.0)
ALMOST_CLEAN = 30.0
"""λ where the reference stops integrating and takes x_0: what is left is σ²/α² = 1e-13 over the data's least variance."""
TOLERANCE = 1e-9
SAMPLES = 10**6
"""Seeds of the x_0 that the starts are noised from; those of the noise count from 0."""


class Score(NamedTuple):
    """How far a run's ends are from the flow's.

    Args:
        median: distance, over the starts.
        flips: share of starts that end nearest to another point of the data than the flow does; None without such points.
    """

    median: float
    flips: float | None


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        side: ours, or diffusers.
        method: the sampler.
        grid: its knots.
        oracle: the problem.
        count: evaluations allowed.
        evaluations: evaluations taken.
        median: distance to the flow's end.
        flips: see Score.
    """

    side: str
    method: str
    grid: str
    oracle: str
    count: int
    evaluations: int
    median: float
    flips: float | None

    @property
    def name(self) -> str:
        """Sampler and grid."""
        return f"{self.method}, {self.grid}"

    @property
    def error(self) -> float:
        """What methods are compared by: the share of flips where the data are points, which a run reaches or misses."""
        return self.median if self.flips is None else self.flips


# The problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Starts at λ = START, and where the exact flow takes them.

    Args:
        oracle: the exact denoiser.
        starts: their number.
        points: data points whose basins are told apart, or none.
    """

    oracle: Oracle
    starts: int
    points: Tensor | None = None
    known: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @property
    def schedule(self) -> Schedule:
        """Of the oracle's process."""
        return self.oracle.process.schedule

    @property
    def noise(self) -> Noise:
        """A seed a start."""
        return Noise(torch.arange(self.starts), self.oracle.process.shape, dtype=torch.float64)

    @cached_property
    def start(self) -> Tensor:
        """α x_0 + σ z at START in the schedule's scaling."""
        level = self.schedule.at(START)
        x0 = self.oracle.sample(torch.arange(self.starts) + SAMPLES)
        return level.alpha * x0 + level.sigma * self.noise.start()

    @cached_property
    def end(self) -> Tensor:
        """x_0 of the flow."""
        last = self.schedule.at(ALMOST_CLEAN)
        return self.oracle(self.at(last), last).x0

    def at(self, level: Level) -> Tensor:
        """X of the trajectories at a level, in its scaling."""
        logsnr = float(level.logsnr)
        if logsnr not in self.known:
            first, last = self.schedule.at(START), self.schedule.at(logsnr)
            self.known[logsnr] = flow(self.oracle, self.start, first, last) / math.hypot(
                last.alpha, last.sigma
            )
        return math.hypot(float(level.alpha), float(level.sigma)) * self.known[logsnr]

    def score(self, x: Tensor) -> Score:
        """Of a run's ends."""
        distance = (x - self.end).flatten(1).norm(dim=1).median().item()
        if self.points is None:
            return Score(distance, None)
        ends, exact = (
            torch.cdist(value.flatten(1), self.points.flatten(1)).argmin(1)
            for value in (x, self.end)
        )
        return Score(distance, (ends != exact).double().mean().item())


def flow(oracle: Oracle, x: Tensor, start: Level, end: Level) -> Tensor:
    """The exact flow within a schedule: DOP853 on dz/da = ε - x_0, z = x/(α+σ), a = σ/(α+σ), which is finite at both ends."""

    def velocity(a: float, z: np.ndarray) -> np.ndarray:
        level = start.schedule.at_blend(a)
        prediction = oracle((level.alpha + level.sigma) * torch.from_numpy(z).view_as(x), level)
        return (prediction.eps - prediction.x0).flatten().numpy()

    if start.logsnr == end.logsnr:
        return x
    z, span = (x / (start.alpha + start.sigma)).flatten().numpy(), (start.blend, end.blend)
    found = solve_ivp(
        velocity, span, z, method="DOP853", rtol=TOLERANCE, atol=TOLERANCE, t_eval=span[1:]
    )
    return (end.alpha + end.sigma) * torch.from_numpy(found.y[:, -1]).view_as(x)


def problems(starts: int = 128) -> dict[str, Problem]:
    """A 2-D mixture of three, a 64-D mixture of six with spectra that fall as 1/k, and the digits' closed-form denoiser.

    The digits have twice as many starts: a share of flips is known to one start.
    """
    digits = Digits("train").x0.double()
    return {
        "mixture": Problem(plane(), starts),
        "64-D": Problem(spectra(), starts),
        "digits": Problem(
            Empirical(digits, process=Process(shape=tuple(digits.shape[1:]))), 2 * starts, digits
        ),
    }


def plane() -> GaussianMixture:
    """Three anisotropic Gaussians in 2-D."""
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
    spreads = [(0.6, 0.2, 0.4), (0.4, 0.3, -1.0), (0.5, 0.25, 2.0)]
    return GaussianMixture(
        means,
        torch.stack([_turned(*spread) for spread in spreads]),
        torch.tensor([0.5, 0.3, 0.2]),
        process=Process(shape=(2,)),
    )


def _turned(long: float, short: float, angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return axes @ torch.diag(torch.tensor([long**2, short**2], dtype=torch.float64)) @ axes.T


def spectra(count: int = 6, size: int = 64) -> GaussianMixture:
    """Gaussians with standard deviations 0.8/k along axes of their own, as images' spectra fall."""
    generator = torch.Generator().manual_seed(0)
    means = 0.35 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(
        torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    )
    variances = (0.8 / torch.arange(1, size + 1, dtype=torch.float64)) ** 2
    return GaussianMixture(means, (axes * variances) @ axes.mT, process=Process(shape=(size,)))


# Our side ------------------------------------------------------------------------------------------------------------

SAMPLERS: tuple[Sampler, ...] = (
    DDIM(),
    Heun(),
    AlphaBlending(2),
    GradientEstimation(),
    DPMSolverPP("2S"),
    DPMSolverPP("2M"),
    DPMSolverPP("3M"),
    UniPC(1),
    UniPC(2),
    UniPC(3),
    AdamsBashforth.lms(4),
    AdamsBashforth.ipndm(4),
    AdamsBashforth.deis(3),
    AdamsBashforth.flow(2),
    AdamsBashforth.flow(3),
    AdamsBashforth.flow(4),
    AdamsMoulton(1),
    AdamsMoulton(2),
    AdamsMoulton(3),
    AdamsMoulton(3, every=10),
    AdamsMoulton(2, "velocity", "logsnr"),
    AdamsMoulton(2, "x0", "a"),
    AdamsMoulton(2, "x0", "logsnr"),
)
WIDEST = math.exp(-START / 2)
GRIDS: dict[str, tuple[CoordinateGrid, Schedule]] = {
    "Trailing, Cosine": (Trailing(), Cosine()),
    "Trailing, linear table": (Trailing(), Discrete()),
    "UniformBlend()": (UniformBlend(), Cosine()),
    "UniformBlend(1.25, 0.5)": (UniformBlend(1.25, 0.5), Cosine()),
    "UniformBlend(1.5, 0.37)": (UniformBlend(1.5, 0.37), Cosine()),
    "UniformLogSNR(high=7)": (UniformLogSNR(START, 7.0), Cosine()),
    "Karras()": (Karras(sigma_max=WIDEST), Cosine()),
    "Karras(0.01, rho=4)": (Karras(0.01, WIDEST, 4.0), Cosine()),
    "Quadratic, Cosine": (Quadratic(), Cosine()),
    "BetaSpacing, Cosine": (BetaSpacing(), Cosine()),
    "AlignYourSteps('svd')": (AlignYourSteps("svd"), Cosine()),
}


def knots_for(
    sampler: Sampler, grid: CoordinateGrid, schedule: Schedule, count: int
) -> tuple[Level, ...] | None:
    """From START to clean, as many as `count` evaluations allow; nothing where not even one step is."""
    grid = grid if isinstance(schedule, Discrete) else Within(grid, low=START)
    for steps in range(count, 0, -1):
        knots = grid.knots(schedule, steps)
        if sampler.evaluations(knots) <= count:
            return knots
    return None


def ours(
    problem: Problem, counts: tuple[int, ...] = COUNTS
) -> Iterator[tuple[str, str, int, int, Score]]:
    """(sampler, grid, count, evaluations, score) of all combinations."""
    for sampler in SAMPLERS:
        for name, (grid, schedule) in GRIDS.items():
            for count in counts:
                knots = knots_for(sampler, grid, schedule, count)
                if knots is not None:
                    x, evaluations = integrate(
                        problem.oracle, sampler, problem.at(knots[0]), knots, problem.noise
                    )
                    yield str(sampler), name, count, evaluations, problem.score(x)


Side = Callable[[Problem, tuple[int, ...]], Iterator[tuple[str, str, int, int, Score]]]


def accuracy(
    sides: dict[str, Side], starts: int = 128, counts: tuple[int, ...] = COUNTS, **given: Problem
) -> Iterator[Row]:
    """Every measurement of every side; of the standard problems where none are given."""
    for oracle, problem in (given or problems(starts)).items():
        for side, measured in sides.items():
            for method, grid, count, evaluations, score in measured(problem, counts):
                yield Row(side, method, grid, oracle, count, evaluations, *score)
