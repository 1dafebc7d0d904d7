"""The variational bound as a further loss, which trains the variance that a network predicts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.gaussian import (
    discretised_log_likelihood,
    gaussian_divergence,
    gaussian_log_density,
)
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.core.transition import (
    last_log_variance_bounds,
    log_variance_bounds,
    posterior_mean,
)
from diffcore.schedules import Level

__all__ = ["Variational"]

FIXED = (
    "objective.variational trains a variance, and that of the process is fixed: set "
    "process.variance to learned and twice the output channels of the network, or leave "
    "variational out"
)
"""The message for a process without a learned variance."""
ROUNDING = 1e-9
"""Rounding of t, in steps, that does not change which step is the last one."""


@dataclass(frozen=True)
class Variational:
    """weight · L, with L the variational bound of `steps` steps in bits per dimension.

        L = steps · E_t [ KL(q(x_s | x_t, x_0) || N(μ, V)) / ln 2 ],   s = t - 1/steps
        V = β̃^(1-v) β^v,   μ = α_s x̂_0 + σ_s r ε̂ without gradient

    A step from t < 1.5/steps is the last one and ends at x_0: its term is -log2 N(x_0; x̂_0, V), the
    probability of the value of x_0 where the data have `values` values, else the density. β̃ is 0
    there, so V is between the β̃ of the step before and β. No step begins at t < 0.5/steps.

    On a table of T levels and with steps = T this is the hybrid objective of iDDPM: Nichol &
    Dhariwal 2021 (2102.09672, eq. 15 and 16). On continuous levels t is any number, so that L is
    the mean of the bounds over all offsets of the steps. Where levels are not drawn uniformly in t,
    as with `corrected`, the terms have the weights of the error; the best V of a level does not
    depend on them.

    The best v depends on the length of a step, and `DDPM` uses v with the β̃ and β of its own steps.
    With `steps` near the number of steps of sampling, v is the best one for them.

    Args:
        weight: factor of L.
        steps: number of steps of the bound, at least 2. For a table it divides the number of
            levels.
        values: number of values of an element of the data, equally spaced from `process.low` to
            `process.high`: 256 for images of 8 bits, 17 for the digits; 0 for continuous data.

    Raises:
        ValueError: a number is out of range.
    """

    weight: float = 0.001
    steps: int = 1000
    values: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}, expected a positive factor of the bound")
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, expected at least 2 steps of the bound")
        if self.values < 0 or self.values == 1:
            raise ValueError(
                f"values is {self.values}, expected at least 2 values of an element of the data, "
                "or 0 for continuous data"
            )

    def check(self, process: Process) -> None:
        """Raise ValueError if the process has no learned variance, or other levels or data."""
        if process.variance != "learned":
            raise ValueError(FIXED)
        levels = process.schedule.steps
        if levels is not None and levels % self.steps:
            raise ValueError(
                f"variational.steps is {self.steps}, which does not divide the {levels} levels of "
                f"{process.schedule}: set it to {levels}"
            )
        if self.values and not -math.inf < process.low < process.high < math.inf:
            raise ValueError(
                f"variational.values is {self.values}, but data from {process.low:g} to "
                f"{process.high:g} have no bins: set it to 0 for continuous data"
            )

    def __call__(
        self, process: Process, prediction: Prediction, truth: Prediction, level: Level
    ) -> Tensor:
        """weight · steps · (the term of each element in bits), of the shape of x.

        Args:
            process: process of the network.
            prediction: x̂_0, ε̂ and v at x_t; only v receives a gradient.
            truth: x_0 and ε of x_t = α x_0 + σ ε.
            level: level t of each sample (B, 1, ...), on the host.

        Raises:
            ValueError: the prediction has no variance: that of the process is fixed.
        """
        assert isinstance(level.t, Tensor)
        if prediction.variance is None:
            raise ValueError(FIXED)
        x0, t, step = truth.x0, level.t, 1 / self.steps
        is_last, is_before = t < (1.5 - ROUNDING) * step, t < (0.5 - ROUNDING) * step
        # For the last step, the pair of levels is that of the step before, whose β̃ bounds V.
        noisy = process.schedule.level(torch.where(is_last, t + step, t).clamp(max=1))
        clean = process.schedule.level(torch.where(is_last, t, t - step).clamp(min=0))
        true_log, log_variance = self._log_variances(prediction.variance, noisy, clean, is_last)
        noisy, clean = noisy.to(x0), clean.to(x0)
        estimate = Prediction(prediction.x0.detach(), prediction.eps.detach())
        means = (posterior_mean(pair, noisy, clean) for pair in (truth, estimate))
        true_mean, mean = means
        divergence = gaussian_divergence(true_mean, true_log, mean, log_variance)
        likelihood = self._log_likelihood(process, x0, estimate.x0, log_variance)
        term = torch.where(is_last.to(x0.device), -likelihood, divergence)
        term = term.masked_fill(is_before.to(x0.device), 0.0)
        return self.weight * self.steps / math.log(2) * term

    @staticmethod
    def _log_variances(
        v: Tensor, noisy: Level, clean: Level, is_last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ln β̃ and ln V of each sample, in the dtype and on the device of v."""
        inner, last = log_variance_bounds(noisy, clean), last_log_variance_bounds(noisy, clean)
        lower, upper = (torch.where(is_last, *pair).to(v) for pair in zip(last, inner, strict=True))
        return lower, lower + v * (upper - lower)

    def _log_likelihood(
        self, process: Process, x0: Tensor, mean: Tensor, log_variance: Tensor
    ) -> Tensor:
        """ln of the probability of each value of x_0, or of its density."""
        if not self.values:
            return gaussian_log_density(x0, mean, log_variance)
        low, high = process.low, process.high
        return discretised_log_likelihood(x0, mean, log_variance, low, high, self.values)
