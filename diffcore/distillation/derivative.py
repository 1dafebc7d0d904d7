"""The derivative of a network along a flow.

The flow moves z = x/(α+σ) by dz/da = v with a = σ/(α+σ), v = ε - x_0. Derivatives here are those by
the logarithm of u = σ/α, which is smooth from clean to pure noise:

    d/d ln u = a (1-a) d/da = -2 d/dλ
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffcore.core.encoding.forward_mode import differentiate_forward
from diffcore.schedules import Level
from diffcore.schedules.base import alpha_sigma

__all__ = ["Derivative", "Differentiation"]

Differentiation = Literal["jvp", "difference"]
"""How a network is differentiated: forward mode, or the central difference of two evaluations."""

Evaluate = Callable[[Tensor, Level], Tensor]
"""An output (B, *shape) of a network at x and a level, whose values are tensors."""


@dataclass(frozen=True)
class Derivative:
    """The total derivative of a network's output by ln u along the flow.

    Args:
        method: jvp, one Jacobian-vector product in forward mode (`torch.func.jvp`), or difference,
            a central difference of two evaluations, for networks without forward mode.
        step: half the distance of both evaluations in ln u, for difference.

    Raises:
        ValueError: the method is unknown, or the step is not positive.
    """

    method: Differentiation = "jvp"
    step: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in get_args(Differentiation):
            raise ValueError(f"method is {self.method!r}, expected jvp or difference")
        if not 0 < self.step < 1:
            raise ValueError(f"step is {self.step}, expected a distance in ln u within (0, 1)")

    def __call__(self, evaluate: Evaluate, x: Tensor, level: Level, velocity: Tensor) -> Tensor:
        """dF/d ln u at x, of the shape of x, where the end of the level does not move.

        Args:
            evaluate: the output as a function of x and the level.
            x: noisy samples (B, *shape).
            level: level of each sample, tensors on the host.
            velocity: v = ε - x_0 of the flow, of the shape of x.
        """
        assert isinstance(level.logsnr, Tensor)
        assert isinstance(level.t, Tensor)
        values = level.to(x)
        a = values.blend
        z, slope = x / (values.alpha + values.sigma), a * (1 - a) * velocity
        if self.method == "difference":
            return self._difference(evaluate, z, level, slope)

        def output(z: Tensor, logsnr: Tensor, t: Tensor) -> Tensor:
            return _evaluate(evaluate, z, logsnr, t, level)

        rate = 2 * level.schedule.density(level.logsnr)  # dt/d ln u
        tangents = slope, torch.full_like(level.logsnr, -2.0), rate
        try:
            with torch.no_grad():
                return differentiate_forward(output, (z, level.logsnr, level.t), tangents)[1]
        except ValueError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            raise ValueError(f"{error}: set the method of the derivative to difference") from error

    @torch.no_grad()
    def _difference(self, evaluate: Evaluate, z: Tensor, level: Level, slope: Tensor) -> Tensor:
        """(F(ln u + h) - F(ln u - h)) / 2h."""
        ends = []
        for h in (self.step, -self.step):
            logsnr = level.logsnr - 2 * h
            assert isinstance(logsnr, Tensor)
            ends.append(
                _evaluate(evaluate, z + h * slope, logsnr, level.schedule.time(logsnr), level)
            )
        return (ends[0] - ends[1]) / (2 * self.step)


def _evaluate(evaluate: Evaluate, z: Tensor, logsnr: Tensor, t: Tensor, level: Level) -> Tensor:
    """The output at z and λ, differentiable by z, λ and t."""
    alpha, sigma = alpha_sigma(logsnr, level.schedule.scaling)
    moved = Level(logsnr, t, alpha, sigma, level.schedule, level.end)
    return evaluate(z * (alpha + sigma).to(z), moved)
