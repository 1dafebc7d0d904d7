"""The distance of samplers to the exact flow for a number of evaluations of an exact denoiser.

All runs start on one trajectory, at λ of the last entry of DDPM's linear table (σ/α = 157), and end
at clean data. Methods that start at more noise, as flow-matching schedulers do at α = 0, start
there on the same trajectory. Thus all runs should reach one x_0, and the error is their distance to
it. A sampler takes as many steps as its evaluations allow.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.oracle import EmpiricalDistribution, GaussianMixture, Oracle
from diffcore.core.process import Process
from diffcore.schedules import Discrete, Level, Schedule
from diffcore.training.data import Digits

COUNTS = (5, 8, 10, 15, 20, 30, 50)
START = Discrete().logsnr(1.0)
LARGEST_SIGMA = math.exp(-START / 2)
"""σ/α at START, 157."""
NEARLY_CLEAN = 30.0
"""λ where the exact flow takes x_0; σ²/α² = 1e-13 over the data's smallest variance remains."""
TOLERANCE = 1e-9
SAMPLES = 10**6
"""First seed of the x_0 that the starts are noised from; the seeds of the noise count from 0."""


class FlowError(NamedTuple):
    """The distance between the ends of a run and those of the exact flow.

    Args:
        median: median distance over the starts.
        flips: share of starts whose nearest data point differs from that of the exact flow; None if
            the data is no set of points.
    """

    median: float
    flips: float | None


@dataclass(frozen=True)
class Measurement:
    """The error of one sampler on one grid.

    Args:
        side: ours or diffusers.
        method: name of the sampler.
        grid: name of the grid.
        oracle: name of the problem.
        count: largest number of evaluations.
        evaluations: number of evaluations of the run.
        median: median distance to the exact flow.
        flips: share of flips, see FlowError.
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
        """The names of sampler and grid."""
        return f"{self.method}, {self.grid}"

    @property
    def error(self) -> float:
        """The number to compare: flips if the data is a set of points, else the median distance."""
        return self.median if self.flips is None else self.flips


# The problems -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Starts at λ = START, and the exact flow from there.

    Args:
        oracle: exact denoiser.
        starts: number of starts.
        points: (M, *shape) data points, whose basins count as flips, or None.
        known: points of the trajectories that are already computed, by λ.
    """

    oracle: Oracle
    starts: int
    points: Tensor | None = None
    known: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the oracle's process."""
        return self.oracle.process.schedule

    @property
    def noise(self) -> Noise:
        """The noise of the starts, each with its own seed."""
        return Noise(torch.arange(self.starts), self.oracle.process.shape, dtype=torch.float64)

    @cached_property
    def start(self) -> Tensor:
        """(N, *shape) α x_0 + σ z at START, in the schedule's scaling."""
        level = self.schedule.at(START)
        x0 = self.oracle.sample(torch.arange(self.starts) + SAMPLES)
        return level.alpha * x0 + level.sigma * self.noise.start()

    @cached_property
    def end(self) -> Tensor:
        """(N, *shape) ends x_0 of the exact flow."""
        last = self.schedule.at(NEARLY_CLEAN)
        return self.oracle(self.at(last), last).x0

    def at(self, level: Level) -> Tensor:
        """Evaluate the trajectories.

        Args:
            level: noise level.

        Returns:
            (N, *shape) x at the level, in its scaling.
        """
        logsnr = float(level.logsnr)
        if logsnr not in self.known:
            first, last = self.schedule.at(START), self.schedule.at(logsnr)
            self.known[logsnr] = flow(self.oracle, self.start, first, last) / math.hypot(
                last.alpha, last.sigma
            )
        return math.hypot(float(level.alpha), float(level.sigma)) * self.known[logsnr]

    def distances(self, x: Tensor) -> Tensor:
        """The distances of the ends of a run to those of the exact flow.

        Args:
            x: (N, *shape) ends.

        Returns:
            (N,) Euclidean distances.
        """
        return (x - self.end).flatten(1).norm(dim=1)

    def measure_error(self, x: Tensor) -> FlowError:
        """Measure the ends of a run.

        Args:
            x: (N, *shape) ends.

        Returns:
            The error.
        """
        distance = self.distances(x).median().item()
        if self.points is None:
            return FlowError(distance, None)
        ends, exact = (
            torch.cdist(value.flatten(1), self.points.flatten(1)).argmin(1)
            for value in (x, self.end)
        )
        return FlowError(distance, (ends != exact).double().mean().item())


def flow(oracle: Oracle, x: Tensor, start: Level, end: Level) -> Tensor:
    """Integrate the exact flow within a schedule.

    DOP853 solves dz/da = ε - x_0 with z = x/(α+σ) and a = σ/(α+σ), which is finite at both ends.

    Args:
        oracle: exact denoiser.
        x: (N, *shape) points at the first level.
        start: first level.
        end: last level.

    Returns:
        (N, *shape) points at the last level.
    """

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
    """Create a 2-D mixture, a 64-D mixture with spectra that fall as 1/k, and the digits.

    Args:
        starts: number of starts; the digits have twice as many, since a share of flips is coarse.

    Returns:
        The problems by name.
    """
    digits = Digits("train").x0.double()
    return {
        "mixture": Problem(plane(), starts),
        "64-D": Problem(spectra(), starts),
        "digits": Problem(
            EmpiricalDistribution(digits, process=Process(shape=tuple(digits.shape[1:]))),
            2 * starts,
            digits,
        ),
    }


def plane() -> GaussianMixture:
    """Create a mixture of three anisotropic Gaussians in 2-D.

    Returns:
        The exact denoiser.
    """
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
    spreads = [(0.6, 0.2, 0.4), (0.4, 0.3, -1.0), (0.5, 0.25, 2.0)]
    return GaussianMixture(
        means,
        torch.stack([_covariance(*spread) for spread in spreads]),
        torch.tensor([0.5, 0.3, 0.2]),
        process=Process(shape=(2,)),
    )


def _covariance(long: float, short: float, angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return axes @ torch.diag(torch.tensor([long**2, short**2], dtype=torch.float64)) @ axes.T


def spectra(count: int = 6, size: int = 64) -> GaussianMixture:
    """Create a mixture of Gaussians with standard deviations 0.8/k along random axes, like images.

    Args:
        count: number of Gaussians.
        size: number of dimensions.

    Returns:
        The exact denoiser.
    """
    generator = torch.Generator().manual_seed(0)
    means = 0.35 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(
        torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    )
    variances = (0.8 / torch.arange(1, size + 1, dtype=torch.float64)) ** 2
    return GaussianMixture(means, (axes * variances) @ axes.mT, process=Process(shape=(size,)))


Ends = tuple[Tensor, int]
"""(N, *shape) x at the end of a run, and the number of its evaluations."""


class Combination(NamedTuple):
    """A sampler on a grid, which a side of the comparison runs.

    Args:
        method: name of the sampler.
        grid: name of the grid.
        run: function of a problem and the largest number of evaluations; it returns None if not
            even one step is possible.
    """

    method: str
    grid: str
    run: Callable[[Problem, int], Ends | None]


# The measurement ---------------------------------------------------------------------------------


def measure_accuracy(
    sides: Mapping[str, Callable[[], Iterable[Combination]]],
    starts: int = 128,
    counts: Sequence[int] = COUNTS,
    **given: Problem,
) -> Iterator[Measurement]:
    """Measure the combinations of all sides.

    Args:
        sides: function that returns the combinations of a side, by name.
        starts: number of starts of the standard problems.
        counts: numbers of evaluations.
        **given: problems by name; default: the standard problems.

    Yields:
        The measurement of each run that is possible.
    """
    for oracle, problem in (given or problems(starts)).items():
        for side, combinations in sides.items():
            for (method, grid, run), count in product(combinations(), counts):
                ends = run(problem, count)
                if ends is None:
                    continue
                x, evaluations = ends
                assert evaluations <= count
                error = problem.measure_error(x)
                yield Measurement(side, method, grid, oracle, count, evaluations, *error)
