"""Knots tuned to a network: the samples of few steps are moved onto the solved flow.

    minimise  1/N Σ_i ln d(x_i(θ), x*_i),   d the root mean square distance of a sample to its end

over the n - 1 inner knots of n steps. They are the partial sums of softmax increments in the
coordinate of `UniformBlend`, so that every θ gives strictly monotone knots. Levenberg-Marquardt
steps use the derivatives of all samples by θ, which are differences of n sets of samples; the
weight 1/d² of a sample makes the mean of squares that of logarithms, to which a few distant samples
add little.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.evaluation.flow.exact_flow import FLOW_GRID
from diffcore.guidance import Guidance
from diffcore.guidance.reference import Condition
from diffcore.samplers import Sampler
from diffcore.sampling.generation import NonFiniteWarning, sample
from diffcore.schedules import Explicit, Grid, Level

__all__ = ["KnotProblem", "Objective", "TunedKnots", "tune_knots"]

DIFFERENCE = 0.3
"""Change of a parameter θ over which a derivative is taken. It averages over the fine structure in
t of a network, which smaller changes of the knots would follow.
"""
FLOOR = 1e-7
"""Distance below which a sample weighs no more: the rounding of float32."""
FIRST_DAMPING, LARGEST_DAMPING = 0.1, 1e4


@dataclass(frozen=True)
class KnotProblem:
    """Samples of a network, and the ends of its flow from the same noise.

    Args:
        denoiser: network with its process, or an exact denoiser.
        guidance: guidance rule.
        seeds: N integers, the seeds of the samples.
        ends: (N, *shape) ends of the flow.
        condition: condition of the samples, as in `sample`.
        batch_size: number of samples that are integrated together.
        micro_batch: number of samples in each call of the network; 0: `batch_size`.
        error: error of the ends, below which distances mean nothing.
    """

    denoiser: DenoiserProtocol
    guidance: Guidance
    seeds: Sequence[int]
    ends: Tensor
    condition: Condition = None
    batch_size: int = 64
    micro_batch: int = 0
    error: float = 0.0

    def residuals(self, sampler: Sampler, grid: Grid, steps: int) -> Tensor:
        """The differences from the ends of the flow, of which the norm is the distance.

        Args:
            sampler: numerical integrator.
            grid: rule that places the knots.
            steps: number of steps.

        Returns:
            (N, elements) in float64; infinite in samples that are not finite.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            x = sample(
                self.denoiser,
                sampler,
                grid,
                steps,
                seeds=self.seeds,
                condition=self.condition,
                guidance=self.guidance,
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
            ).x
        difference = (x.double() - self.ends.double()).flatten(1)
        return difference.nan_to_num(math.inf) / math.sqrt(difference.shape[1])

    def distances(self, sampler: Sampler, grid: Grid, steps: int) -> Tensor:
        """The distances (N,) of the samples to the ends of the flow; arguments as `residuals`."""
        return self.residuals(sampler, grid, steps).norm(dim=1)


@dataclass(frozen=True)
class KnotCoordinates:
    """The knots of n steps as a function of n - 1 parameters θ.

        a_i = a_0 (1 - Σ_{j≤i} softmax(θ, 0)_j),   a the coordinate of UniformBlend(1.25, 0.5)

    Args:
        first: first knot.
        cleanest: λ of the cleanest level at which the network is evaluated.
    """

    first: Level
    cleanest: float

    def grid(self, theta: np.ndarray) -> Explicit:
        """The knots of parameters θ (n - 1,)."""
        shares = np.exp(np.append(theta, 0.0) - max(0.0, *theta))
        a = FLOW_GRID._coordinate(self.first) * (1 - np.cumsum(shares / shares.sum())[:-1])
        schedule = self.first.schedule
        inner = [float(FLOW_GRID._at(schedule, float(value)).logsnr) for value in a]
        inner[-1] = min(inner[-1], self.cleanest)
        return Explicit((float(self.first.logsnr), *inner, math.inf))

    def theta(self, knots: Sequence[Level]) -> np.ndarray:
        """The parameters (n - 1,) of knots."""
        a = np.array([FLOW_GRID._coordinate(knot) for knot in knots])
        logs = np.log(np.maximum(a[:-1] - a[1:], 1e-9))
        return np.asarray(logs[:-1] - logs[-1])


@dataclass
class TunedKnots:
    """Knots that were tuned, and how.

    Args:
        grid: the knots.
        value: mean logarithm of the distances of the fitted samples.
        evaluated: number of sets of samples that were drawn.
        history: the mean logarithm after each step that was taken, from that of the start.
    """

    grid: Explicit
    value: float
    evaluated: int = 0
    history: list[float] = field(default_factory=list)


def tune_knots(
    problem: KnotProblem,
    sampler: Sampler,
    start: Sequence[Level],
    iterations: int = 6,
    report: Callable[[str], None] = lambda line: None,
) -> TunedKnots:
    """Tune the inner knots of a sampler.

    Args:
        problem: samples to fit, and the ends of their flow.
        sampler: numerical integrator.
        start: n + 1 knots to start from, n at least 2; the last one is clean.
        iterations: number of Levenberg-Marquardt steps, each of n - 1 sets of samples for the
            derivatives and about one for the step.
        report: receives a line after each step.

    Returns:
        The tuned knots, which fit at least as well as `start`.

    Raises:
        ValueError: there are fewer than 2 steps, and so no inner knot.
    """
    steps = len(start) - 1
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2, which have a knot to tune")
    schedule = start[0].schedule
    coordinates = KnotCoordinates(start[0], schedule.cleanest.logsnr_range[1])
    objective = Objective(problem, sampler, coordinates, steps)
    theta, damping = coordinates.theta(start), FIRST_DAMPING
    residuals = objective.residuals(theta)
    found = TunedKnots(coordinates.grid(theta), mean_log(residuals))
    found.history.append(found.value)
    for number in range(iterations):
        gradient, curvature = objective.derivatives(theta, residuals)
        while damping < LARGEST_DAMPING:
            change = _damped_step(gradient, curvature, damping)
            trial = objective.residuals(theta + change)
            if mean_log(trial) < found.value:
                break
            damping *= 4
        else:
            break
        theta, residuals, damping = theta + change, trial, damping / 4
        found.grid, found.value = coordinates.grid(theta), mean_log(residuals)
        found.history.append(found.value)
        report(f"step {number + 1}: geometric mean of the distances {math.exp(found.value):.4g}")
        if found.history[-2] - found.value < 1e-3:
            break
    found.evaluated = objective.evaluated
    return found


@dataclass
class Objective:
    """Residuals of a sampler as a function of θ, and their derivatives.

    Args:
        problem: samples to fit.
        sampler: numerical integrator.
        coordinates: knots as a function of θ.
        steps: number of steps.
        evaluated: number of sets of samples that were drawn.
    """

    problem: KnotProblem
    sampler: Sampler
    coordinates: KnotCoordinates
    steps: int
    evaluated: int = 0

    def residuals(self, theta: np.ndarray) -> Tensor:
        """(N, elements) residuals; infinite if the knots are no knots of the schedule."""
        self.evaluated += 1
        try:
            grid = self.coordinates.grid(theta)
            return self.problem.residuals(self.sampler, grid, self.steps)
        except ValueError:  # knots beyond the schedule, or equal to rounding
            ends = self.problem.ends
            return torch.full((len(ends), 1), math.inf, dtype=torch.float64)

    def derivatives(self, theta: np.ndarray, residuals: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Gauss-Newton curvature of the mean logarithm of the distances.

        Args:
            theta: parameters (p,).
            residuals: residuals (N, elements) there.

        Returns:
            The gradient (p,) and the curvature (p, p).
        """
        columns = []
        for index in range(len(theta)):
            moved = theta.copy()
            moved[index] += DIFFERENCE
            columns.append((self.residuals(moved) - residuals) / DIFFERENCE)
        weight = 1 / (residuals.square().sum(1) + FLOOR**2)
        weight = torch.where(weight.isfinite(), weight, 0.0) / len(residuals)
        jacobian = torch.stack(columns, 2).nan_to_num(0.0, 0.0, 0.0)
        values = residuals.nan_to_num(0.0, 0.0, 0.0)
        gradient = torch.einsum("i,ij,ijp->p", weight, values, jacobian)
        curvature = torch.einsum("i,ijp,ijq->pq", weight, jacobian, jacobian)
        return gradient.numpy(), curvature.numpy()


def mean_log(residuals: Tensor) -> float:
    """The mean logarithm of the distances; infinite if a sample is not finite."""
    return residuals.norm(dim=1).clamp(min=FLOOR).log().mean().item()


def _damped_step(gradient: np.ndarray, curvature: np.ndarray, damping: float) -> np.ndarray:
    """-(H + μ diag H)⁻¹ g, at most 1 in each parameter: a change of an increment by e."""
    diagonal = np.diag(np.diag(curvature) + 1e-12)
    change = -np.linalg.solve(curvature + damping * diagonal, gradient)
    return np.asarray(change / max(1.0, float(np.abs(change).max())))
