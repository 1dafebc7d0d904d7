"""The knots and the multistep coefficients of a sampler as functions of parameters θ.

    a_i = a_0 (1 - Σ_{j≤i} softmax(θ_1 .. θ_{n-1}, 0)_j)

The inner knots of n steps are the partial sums of softmax increments in a, the coordinate of
UniformBlend(1.25, 0.5), so that every θ gives strictly monotone knots. The coefficients of
`TunedMultistep` follow, row by row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffcore.evaluation.flow.exact_flow import FLOW_GRID
from diffcore.samplers import Sampler, TunedMultistep
from diffcore.schedules import Explicit, Level

__all__ = ["KnotCoordinates", "SolverCoordinates"]

KNOT_DIFFERENCE, COEFFICIENT_DIFFERENCE = 0.3, 0.05
"""Changes of parameters over which derivatives are taken. Those of knots average over the fine
structure in t of a network, which smaller changes would follow.
"""


@dataclass(frozen=True)
class KnotCoordinates:
    """The knots of n steps as a function of n - 1 parameters θ.

    Args:
        first: first knot.
        cleanest: λ of the cleanest level at which the network is evaluated.
    """

    first: Level
    cleanest: float

    def grid(self, theta: np.ndarray) -> Explicit:
        """The knots of parameters.

        Args:
            theta: parameters (n - 1,).

        Returns:
            The n + 1 knots.
        """
        shares = np.exp(np.append(theta, 0.0) - max(0.0, *theta))
        a = FLOW_GRID._coordinate(self.first) * (1 - np.cumsum(shares / shares.sum())[:-1])
        schedule = self.first.schedule
        inner = [float(FLOW_GRID._at(schedule, float(value)).logsnr) for value in a]
        inner[-1] = min(inner[-1], self.cleanest)
        return Explicit((float(self.first.logsnr), *inner, math.inf))

    def theta(self, knots: Sequence[Level]) -> np.ndarray:
        """The parameters of knots.

        Args:
            knots: n + 1 levels.

        Returns:
            (n - 1,) parameters.
        """
        a = np.array([FLOW_GRID._coordinate(knot) for knot in knots])
        logs = np.log(np.maximum(a[:-1] - a[1:], 1e-9))
        return np.asarray(logs[:-1] - logs[-1])


@dataclass(frozen=True)
class SolverCoordinates:
    """A sampler and the knots of n steps as a function of parameters θ.

    θ has n - 1 parameters of the knots and, with a history, for each step i = 1 .. n - 1 those of
    min(i, history) differences of x_0, and as many of ε.

    Args:
        sampler: numerical integrator, without tuned coefficients.
        knots: knots as a function of their parameters.
        steps: number of steps n, at least 2.
        history: largest number of differences that a step adds; 0: only the knots have parameters.
        guidance: guidance rule, as text.
    """

    sampler: Sampler
    knots: KnotCoordinates
    steps: int
    history: int = 0
    guidance: str = ""

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.steps - 1 + 2 * sum(self._lengths)

    @property
    def differences(self) -> np.ndarray:
        """The change of each parameter over which its derivative is taken."""
        changes = np.full(self.size, COEFFICIENT_DIFFERENCE)
        changes[: self.steps - 1] = KNOT_DIFFERENCE
        return changes

    @property
    def _lengths(self) -> list[int]:
        """The number of differences in each step after the first."""
        return [min(step, self.history) for step in range(1, self.steps)]

    def theta(self, knots: Sequence[Level]) -> np.ndarray:
        """The parameters of knots, with coefficients of zero.

        Args:
            knots: n + 1 levels.

        Returns:
            (p,) parameters.
        """
        theta = np.zeros(self.size)
        theta[: self.steps - 1] = self.knots.theta(knots)
        return theta

    def combination(self, theta: np.ndarray) -> tuple[Sampler, Explicit]:
        """The sampler and the knots of parameters.

        Args:
            theta: parameters (p,).

        Returns:
            The sampler, with tuned coefficients if there is a history, and the knots.
        """
        grid = self.knots.grid(theta[: self.steps - 1])
        if not self.history:
            return self.sampler, grid
        values = iter(theta[self.steps - 1 :].tolist())
        x0, eps = (
            tuple(tuple(next(values) for _ in range(length)) for length in self._lengths)
            for _ in range(2)
        )
        return TunedMultistep(self.sampler, x0, eps, self.guidance), grid
