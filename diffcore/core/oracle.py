"""Exact denoisers: distributions for which E[x_0 | x] and E[ε | x] have a closed form.

Tests, benchmarks and figures compare samplers and guidance with them. An oracle has the interface
of a network's `Denoiser`: with labels it is conditional, and with None or the null label
unconditional, so the exact guided field follows from one object.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, labels_of
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.schedules import Cosine, Level, Real, Schedule

__all__ = [
    "PLANE_NAMES",
    "EmpiricalDistribution",
    "GaussianMixture",
    "Oracle",
    "plane_distribution",
]

PLANE_NAMES = ("moons", "mixture", "ring", "points")
"""Names of the distributions in the plane."""
ARC = 32
"""Number of Gaussians along a half circle of the moons, about a standard deviation apart."""


class Oracle(DenoiserProtocol, ABC):
    """A mixture of known components, each with a class label.

    A condition restricts the mixture to the components of its class; the null label
    `process.classes` restricts nothing.

    Args:
        weights: positive weights (K,) of the components; they are normalised.
        labels: int64 class labels (K,) of the components; None sets all of them to 0.
        process: schedule and number of classes of the denoiser.

    Raises:
        ValueError: it is evaluated on the host under a class without components. Choose another
            class; on another device the values would be NaN.
    """

    def __init__(self, weights: Tensor, labels: Tensor | None, process: Process) -> None:
        self.log_weights = weights.log()
        self.labels = torch.zeros_like(weights, dtype=torch.int64) if labels is None else labels
        self.process, self._classes = process, set(self.labels.tolist())

    @abstractmethod
    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        """E[x_0 | x] and E[ε | x] for x of shape (B, *shape)."""

    @abstractmethod
    def score(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The score ∇ ln p(x) at a level, of the shape of x.

        Args:
            x: noisy samples (B, *shape).
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,); None for no condition.
        """

    @abstractmethod
    def log_density(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """ln p(x) at a level, of shape (B,).

        Args:
            x: noisy samples (B, *shape).
            level: noise level of all samples, or levels that broadcast against x.
            condition: int64 class labels (B,); None for no condition.
        """

    @abstractmethod
    def sample(self, seeds: Tensor, condition: Tensor | None = None) -> Tensor:
        """Exact samples of x_0, of shape (B, *shape); each depends only on its seed and its label.

        Args:
            seeds: 64-bit seeds, an int64 tensor of shape (B,).
            condition: int64 class labels (B,); None for no condition.
        """

    def _log_prior(self, rows: int, condition: BatchCondition | None) -> Tensor:
        """Normalised log weights (B, K) of the components given the condition."""
        condition = labels_of(condition)
        if condition is None:
            return self.log_weights.log_softmax(0).expand(rows, -1)
        if condition.device.type == "cpu":  # elsewhere, reading the values would wait for them
            self._check_classes(condition)
        other = (condition[:, None] != self.labels) & (condition[:, None] != self.process.classes)
        return self.log_weights.masked_fill(other, -math.inf).log_softmax(1)

    def _check_classes(self, condition: Tensor) -> None:
        """Raise ValueError if a class has no component."""
        known = {*self._classes, self.process.classes}
        empty = [label for label in condition.numpy().tolist() if label not in known]
        if empty:
            raise ValueError(
                f"class {empty[0]} has no component, expected one of {sorted(self._classes)}, or "
                f"{self.process.classes} for no condition"
            )

    def _component(self, seeds: Tensor, condition: Tensor | None) -> Tensor:
        """The index (B,) of one component for each seed, drawn from the prior."""
        u = uniform(seeds, Stream.ORACLE, 0)
        return (
            (u > self._log_prior(len(seeds), condition).exp().cumsum(1))
            .sum(1)
            .clamp(max=len(self.log_weights) - 1)
        )


class GaussianMixture(Oracle):
    """p(x_0) = Σ_k π_k N(m_k, C_k), so that x has components N(α m_k, α² C_k + σ² I).

        E[x_0 | x, k] = m_k + α C_k (α² C_k + σ² I)⁻¹ (x - α m_k)

    It is computed in the eigenbasis of C_k, which is exact from λ = -inf to +inf.

    Args:
        means: means m_k (K, *shape).
        covariances: positive definite covariances C_k (K, D, D), where D is the size of one x_0.
        weights: weights π_k (K,), which are normalised; equal by default.
        labels: int64 class label of each component (K,); all 0 by default.
        process: schedule and number of classes; by default a cosine schedule with as many classes
            as the labels have.

    Raises:
        ValueError: a covariance has an eigenvalue that is not positive.
    """

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        process: Process | None = None,
    ) -> None:
        weights = torch.ones(len(means)) if weights is None else weights
        super().__init__(weights.double(), labels, process or _process(means, labels))
        self.means, self.dtype = means.double().flatten(1), means.dtype
        self.eigenvalues, self.axes = torch.linalg.eigh(covariances.double())
        if not (self.eigenvalues > 0).all():
            raise ValueError(
                f"covariances have eigenvalues {self.eigenvalues.tolist()}, expected positive ones"
            )

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        alpha, sigma = (_column(value, x) for value in (level.alpha, level.sigma))
        z, variance = self._whiten(x, level)
        r = self._log_joint(z, variance, condition).softmax(1)
        x0 = self.means + self._rotate(alpha * self.eigenvalues / variance * z)
        eps = self._rotate(sigma / variance * z)
        x0, eps = (
            torch.einsum("bk,bkd->bd", r, value).view_as(x).to(x.dtype) for value in (x0, eps)
        )
        return Prediction(x0, eps)

    def score(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        z, variance = self._whiten(x, level)
        r = self._log_joint(z, variance, condition).softmax(1)
        return torch.einsum("bk,bkd->bd", r, self._rotate(-z / variance)).view_as(x).to(x.dtype)

    def log_density(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        return self._log_joint(*self._whiten(x, level), condition).logsumexp(1).to(x.dtype)

    def sample(self, seeds: Tensor, condition: Tensor | None = None) -> Tensor:
        k = self._component(seeds, condition)
        z = normal(seeds, Stream.ORACLE, 1, self.means.shape[1:], dtype=torch.float64)
        x0 = self.means[k] + torch.einsum(
            "bij,bj->bi", self.axes[k], self.eigenvalues[k].sqrt() * z
        )
        return x0.unflatten(1, self.process.shape).to(self.dtype)

    def _whiten(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Coordinates (B, K, D) of x - α m_k along the axes of component k, and their variances."""
        alpha, sigma = (_column(value, x) for value in (level.alpha, level.sigma))
        z = torch.einsum(
            "bkd,kde->bke", x.double().flatten(1)[:, None] - alpha * self.means, self.axes
        )
        return z, alpha**2 * self.eigenvalues + sigma**2

    def _rotate(self, z: Tensor) -> Tensor:
        return torch.einsum("bke,kde->bkd", z, self.axes)

    def _log_joint(self, z: Tensor, variance: Tensor, condition: BatchCondition | None) -> Tensor:
        log_normal = -(z**2 / variance + (2 * math.pi * variance).log()).sum(2) / 2
        return log_normal + self._log_prior(len(z), condition)


class EmpiricalDistribution(Oracle):
    """p(x_0) = (1/N) Σ_i δ(x_0 - d_i): the closed-form denoiser of a data set of N points.

        E[x_0 | x] = Σ_i r_i d_i,   ln r_i = (α x·d_i - α² |d_i|² / 2) / σ² + const

    The points are centred at their mean in float64, which avoids differences of large squares and
    is stable far from the data. The denoiser is undefined at σ = 0.

    Args:
        points: the data (N, *shape).
        labels: int64 class label of each point (N,); all 0 by default.
        process: schedule and number of classes; by default a cosine schedule with as many classes
            as the labels have.
    """

    def __init__(
        self, points: Tensor, labels: Tensor | None = None, process: Process | None = None
    ) -> None:
        points = points.double()
        super().__init__(points.new_ones(len(points)), labels, process or _process(points, labels))
        self.center = points.flatten(1).mean(0)
        self.points = points.flatten(1) - self.center
        self.half_norms = (self.points**2).sum(1) / 2

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        alpha, sigma = _level_columns(x, level)
        r = self._logits(x, level, condition).softmax(1)
        x0 = self.center + r @ self.points
        eps = (x.double().flatten(1) - alpha * x0) / sigma
        x0, eps = (value.view_as(x).to(x.dtype) for value in (x0, eps))
        return Prediction(x0, eps)

    def score(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        eps = self(x.double(), level, condition).eps.flatten(1)
        return (-eps / _level_columns(x, level)[1]).view_as(x).to(x.dtype)

    def log_density(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        y, _, sigma = self._centred(x, level)
        log_normal = (
            -(y**2).sum(1) / (2 * sigma[:, 0] ** 2)
            - y.shape[1] * (2 * math.pi * sigma[:, 0] ** 2).log() / 2
        )
        return (self._logits(x, level, condition).logsumexp(1) + log_normal).to(x.dtype)

    def sample(self, seeds: Tensor, condition: Tensor | None = None) -> Tensor:
        return (self.center + self.points[self._component(seeds, condition)]).unflatten(
            1, self.process.shape
        )

    def _centred(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """x - α m of the mean m (B, D), and the columns α and σ."""
        alpha, sigma = _level_columns(x, level)
        return x.double().flatten(1) - alpha * self.center, alpha, sigma

    def _logits(self, x: Tensor, level: Level, condition: BatchCondition | None) -> Tensor:
        """ln r_i (B, N), up to a constant that is common to all points."""
        y, alpha, sigma = self._centred(x, level)
        log_likelihood = alpha / sigma**2 * (y @ self.points.T - alpha * self.half_norms)
        return log_likelihood + self._log_prior(len(x), condition)


def plane_distribution(name: str, schedule: Schedule | None = None) -> Oracle:
    """The exact denoiser of a distribution in the plane with two classes.

        mixture   three Gaussians, of which the first is class 0
        moons     two interleaved half circles, a class each: 64 Gaussians along them
        ring      eight Gaussians on a circle, classes in turn
        points    a data set of twelve points: its exact denoiser remembers them

    Args:
        name: moons, mixture, ring or points.
        schedule: noise levels; default: Cosine().

    Returns:
        The denoiser, whose process has the standard deviation of the distribution and the shape
        (2,).

    Raises:
        ValueError: there is no distribution of this name.

    Example:
        >>> moons = plane_distribution("moons")
        >>> moons.sample(torch.arange(5), torch.tensor([0, 0, 1, 1, 2])).shape
        torch.Size([5, 2])
    """
    schedule = Cosine() if schedule is None else schedule
    match name:
        case "moons":
            return _mixture(*_half_circles(), schedule)
        case "mixture":
            return _mixture(*_three_gaussians(), schedule)
        case "ring":
            return _mixture(*_ring(), schedule)
        case "points":
            points, labels = _twelve_points()
            return EmpiricalDistribution(
                points, labels, _plane_process(schedule, float(points.var(0, correction=0).mean()))
            )
    raise ValueError(f"the distribution is {name!r}, expected one of {', '.join(PLANE_NAMES)}")


def _plane_process(schedule: Schedule, variance: float) -> Process:
    return Process(schedule, shape=(2,), sigma_data=math.sqrt(variance), classes=2, dropout=0.1)


def _mixture(means: Tensor, covariances: Tensor, labels: Tensor, schedule: Schedule) -> Oracle:
    """A mixture of equal weights."""
    spread = means.var(0, correction=0) + covariances.diagonal(dim1=1, dim2=2).mean(0)
    process = _plane_process(schedule, float(spread.mean()))
    return GaussianMixture(means, covariances, labels=labels, process=process)


def _circle(angles: Tensor) -> Tensor:
    """Points (N, 2) of the unit circle."""
    return torch.stack((angles.cos(), angles.sin()), 1)


def _half_circles() -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and labels along the half circles of the data set `TwoMoons`."""
    upper = _circle(math.pi * (torch.arange(ARC, dtype=torch.float64) + 0.5) / ARC)
    lower = torch.tensor((1.0, 0.5)) - upper
    means = (torch.cat((upper, lower)) - torch.tensor((0.5, 0.25))) / math.sqrt(2)
    covariances = 0.005 * torch.eye(2, dtype=torch.float64).expand(2 * ARC, 2, 2)
    return means, covariances, torch.arange(2).repeat_interleave(ARC)


def _three_gaussians() -> tuple[Tensor, Tensor, Tensor]:
    deviations = torch.tensor([(0.6, 0.15), (0.4, 0.2), (0.5, 0.15)], dtype=torch.float64)
    axes = _circle(torch.tensor((0.4, -1.0, 2.0), dtype=torch.float64))
    rotations = torch.stack((axes, axes.flip(1) * torch.tensor((-1, 1))), 2)  # columns are axes
    covariances = rotations @ deviations.square().diag_embed() @ rotations.mT
    means = torch.tensor([(1.0, 0.5), (-1.0, 0.8), (0.2, -1.2)], dtype=torch.float64)
    return means, covariances, torch.tensor([0, 1, 1])


def _ring() -> tuple[Tensor, Tensor, Tensor]:
    means = 1.2 * _circle(math.pi / 4 * torch.arange(8, dtype=torch.float64))
    covariances = 0.015 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2)
    return means, covariances, torch.arange(8) % 2


def _twelve_points() -> tuple[Tensor, Tensor]:
    """Points of a sunflower, whose golden angle spreads them evenly, in classes in turn."""
    index = torch.arange(12, dtype=torch.float64)
    radius = 1.5 * ((index + 0.5) / 12).sqrt()
    return radius[:, None] * _circle(index * math.pi * (3 - math.sqrt(5))), index.long() % 2


def _process(data: Tensor, labels: Tensor | None) -> Process:
    """A process for the data: the cosine schedule, with as many classes as the labels have."""
    classes = 1 if labels is None else int(labels.max()) + 1
    return Process(shape=tuple(data.shape[1:]), classes=classes, dropout=0.5)


def _column(value: Real, x: Tensor) -> Tensor:
    """α or σ as float64 (B or 1, 1, 1)."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).reshape(-1, 1, 1)


def _level_columns(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """α and σ as float64 (B or 1, 1).

    Raises:
        ValueError: σ is 0, where x = α x_0 determines x_0 and leaves ε undefined.
    """
    alpha, sigma = (_column(value, x)[:, 0] for value in (level.alpha, level.sigma))
    if not (sigma > 0).all():
        raise ValueError(
            "the closed-form denoiser of a data set is undefined at σ = 0: evaluate it at σ > 0"
        )
    return alpha, sigma
