"""Knots and coefficients tuned to a network: samples of few steps are moved onto the solved flow.

    minimise  1/N Σ_i ln d(x_i(θ), x*_i),   d the root mean square distance of a sample to its end

over the parameters θ of a sampler and its knots. Levenberg-Marquardt steps use the derivatives of
all samples by θ, which are differences of as many sets of samples as there are parameters; the
weight 1/d² of a sample makes the mean of squares that of logarithms, to which a few distant samples
add little.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffcore.core.denoiser import DenoiserProtocol
from diffcore.evaluation.flow.recorded_denoiser import RecordedDenoiser
from diffcore.evaluation.flow.solver_coordinates import SolverCoordinates
from diffcore.guidance import Guidance
from diffcore.guidance.reference import Condition
from diffcore.samplers import Sampler
from diffcore.sampling.generation import NonFiniteWarning, sample
from diffcore.schedules import Explicit, Grid

__all__ = ["KnotProblem", "Objective", "TunedSolver", "tune_solver"]

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


@dataclass
class TunedSolver:
    """A sampler and knots that were tuned, and how.

    Args:
        sampler: numerical integrator, with its tuned coefficients.
        grid: the knots.
        theta: parameters of both.
        value: mean logarithm of the distances of the fitted samples.
        evaluated: number of sets of samples that were drawn.
        history: the mean logarithm after each step that was taken, from that of the start.
    """

    sampler: Sampler
    grid: Explicit
    theta: np.ndarray
    value: float
    evaluated: int = 0
    history: list[float] = field(default_factory=list)


def tune_solver(
    problem: KnotProblem,
    coordinates: SolverCoordinates,
    theta: np.ndarray,
    iterations: int = 6,
    report: Callable[[str], None] = lambda line: None,
) -> TunedSolver:
    """Tune the parameters of a sampler and its knots.

    Args:
        problem: samples to fit, and the ends of their flow.
        coordinates: sampler and knots as functions of their parameters.
        theta: parameters (p,) to start from.
        iterations: number of Levenberg-Marquardt steps, each of p sets of samples for the
            derivatives and about one for the step.
        report: receives a line after each step.

    Returns:
        The tuned sampler and knots, which fit at least as well as the start.
    """
    objective, damping = Objective(problem, coordinates), FIRST_DAMPING
    residuals = objective.residuals(theta)
    found = TunedSolver(*coordinates.combination(theta), theta, mean_log(residuals))
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
        found.sampler, found.grid = coordinates.combination(theta)
        found.theta, found.value = theta, mean_log(residuals)
        found.history.append(found.value)
        report(f"step {number + 1}: geometric mean of the distances {math.exp(found.value):.4g}")
        if found.history[-2] - found.value < 1e-3:
            break
    found.evaluated = objective.evaluated
    return found


class Objective:
    """Residuals of a sampler as a function of θ, and their derivatives.

    Args:
        problem: samples to fit.
        coordinates: sampler and knots as functions of θ.
    """

    def __init__(self, problem: KnotProblem, coordinates: SolverCoordinates) -> None:
        self._recorded = RecordedDenoiser(problem.denoiser)
        self.problem = replace(problem, denoiser=self._recorded)
        self.coordinates = coordinates
        self.evaluated = 0
        """Number of sets of samples that were drawn."""

    def residuals(self, theta: np.ndarray) -> Tensor:
        """(N, elements) residuals; infinite if the knots are no knots of the schedule.

        Their evaluations are recorded, for the derivatives there.
        """
        with self._recorded.recording():
            return self._residuals(theta)

    def _residuals(self, theta: np.ndarray) -> Tensor:
        self.evaluated += 1
        try:
            sampler, grid = self.coordinates.combination(theta)
            return self.problem.residuals(sampler, grid, self.coordinates.steps)
        except ValueError:  # knots beyond the schedule, or equal to rounding
            ends = self.problem.ends
            return torch.full((len(ends), 1), math.inf, dtype=torch.float64)

    def derivatives(self, theta: np.ndarray, residuals: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Gauss-Newton curvature of the mean logarithm of the distances.

        Args:
            theta: parameters (p,), those of the last call of `residuals`.
            residuals: residuals (N, elements) there.

        Returns:
            The gradient (p,) and the curvature (p, p).
        """
        columns = []
        for index, difference in enumerate(self.coordinates.differences):
            moved = theta.copy()
            moved[index] += difference
            columns.append((self._residuals(moved) - residuals) / difference)
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
