"""The flow map of a denoiser: what networks that sample in few steps are trained to give."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import DenoiserProtocol, DenoiserWrapper
from diffcore.core.estimate import require_posterior_mean
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level, Real

__all__ = ["FlowMap"]


MARGIN = 1e-8
"""Distance in θ from the clean level and from pure noise at which the flow begins there."""


class FlowMap(DenoiserWrapper):
    """The pair of a few-step network that is exact for a denoiser, by integration of its flow.

        consistency      x_0 = the clean end of the flow through x,   ε = (x - α x_0)/σ
        mean_velocity    ε - x_0 = (z - z_r)/(a - a_r),   z = x/(α+σ),   a = σ/(α+σ)

    where z_r is the point of the flow at the level `Level.end`; at the same level, the pair is that
    of the denoiser. In x' = x/√(α²+σ²) and θ = arctan(σ/α) the flow

        dx'/dθ = ε cos θ - x_0 sin θ

    is smooth from clean to pure noise. It is integrated by the classical Runge-Kutta method, of
    order 4, with steps of equal θ in float64.

    Args:
        inner: denoiser whose pair is the posterior mean, such as an oracle.
        estimate: consistency or mean_velocity.
        steps: number of steps of the integration.

    Raises:
        ValueError: the pair of the denoiser is not the posterior mean, or steps is below 1.

    Example:
        FlowMap(oracle, "consistency") as the denoiser of `diffcore.sample`: Consistency() samples
        the distribution of the oracle in any number of steps.
    """

    def __init__(
        self,
        inner: DenoiserProtocol,
        estimate: Literal["consistency", "mean_velocity"],
        steps: int = 64,
    ) -> None:
        super().__init__(inner)
        require_posterior_mean(inner.process, "a flow map")
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1 step of the integration")
        self.process, self.steps = replace(inner.process, estimate=estimate), steps

    def __call__(
        self, x: Tensor, level: Level, condition: BatchCondition | None = None
    ) -> Prediction:
        start = _angle(level.logsnr, x)
        if self.process.estimate == "consistency":
            clean = self._integrate(_scaled(x, level), start, torch.zeros_like(start), condition)
            alpha, sigma = (_column(value, x) for value in (level.alpha, level.sigma))
            return Prediction(clean.to(x.dtype), ((x - alpha * clean) / sigma).to(x.dtype))
        stop = _angle((level.end or level).logsnr, x)
        point = self._integrate(_scaled(x, level), start, stop, condition)
        a, r = (angle.sin() / (angle.sin() + angle.cos()) for angle in (start, stop))
        z, z_r = (
            value / (angle.sin() + angle.cos())
            for value, angle in ((_scaled(x, level), start), (point, stop))
        )
        x0, eps = self.inner(x.double(), level, condition)
        is_same = a == r
        mean = torch.where(is_same, eps - x0, (z - z_r) / torch.where(is_same, 1.0, a - r))
        return Prediction((z - a * mean).to(x.dtype), (z + (1 - a) * mean).to(x.dtype))

    def _integrate(
        self, x: Tensor, start: Tensor, stop: Tensor, condition: BatchCondition | None
    ) -> Tensor:
        """The point at the angle `stop` of the flow through x at `start`, in the vp scaling."""
        h = (stop - start) / self.steps
        for step in range(self.steps):
            angle = start + step * h
            k1 = self._slope(x, angle, condition)
            k2 = self._slope(x + h / 2 * k1, angle + h / 2, condition)
            k3 = self._slope(x + h / 2 * k2, angle + h / 2, condition)
            k4 = self._slope(x + h * k3, angle + h, condition)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def _slope(self, x: Tensor, angle: Tensor, condition: BatchCondition | None) -> Tensor:
        """dx'/dθ at an angle of each sample, within [0, π/2] up to rounding."""
        # λ is finite and has a derivative at both ends.
        angle = angle.clamp(MARGIN, math.pi / 2 - MARGIN)
        level = self.process.schedule.at((-2 * angle.tan().log()).cpu())
        x0, eps = self.inner(x * _norm(level, x), level, condition)
        return angle.cos() * eps - angle.sin() * x0


def _angle(logsnr: Real, x: Tensor) -> Tensor:
    """θ = arctan(σ/α) in float64, a column that broadcasts against x."""
    return (_column(logsnr, x) / -2).exp().arctan()


def _scaled(x: Tensor, level: Level) -> Tensor:
    """x/√(α²+σ²) in float64."""
    return x.double() / _norm(level, x)


def _norm(level: Level, x: Tensor) -> Tensor:
    return torch.hypot(_column(level.alpha, x), _column(level.sigma, x))


def _column(value: Real, x: Tensor) -> Tensor:
    """A value of a level as float64 on the device of x, of shape (B or 1, 1, ...)."""
    value = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return value if value.ndim == x.ndim else value.reshape(-1, *[1] * (x.ndim - 1))
