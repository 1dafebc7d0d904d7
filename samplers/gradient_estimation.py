"""Gradient estimation: a sampler that extrapolates ε from the last two predictions."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import (
    Knots,
    Sampler,
    State,
    is_clean,
    is_falling,
    is_interior,
    multiply,
)
from diffcore.schedules import Level

__all__ = ["GradientEstimation"]


class _LastKnot(NamedTuple):
    """Level and ε at the last knot."""

    level: Level
    eps: Tensor


@dataclass(frozen=True)
class GradientEstimation(Sampler[_LastKnot]):
    """y_s = y + (u_p - u) ε̄ + √(u_s² - u_p²) z,  ε̄ = γ ε + (1-γ) ε',  ε' at the last knot.

    u_p = (u_s / u^μ)^{1/(1-μ)}, in y = x/α, u = σ/α. μ = 0 is deterministic, with u_p = u_s. γ = 1
    with μ = ½ is the ancestral step of DDPM. γ = 1.5 is iPNDM(2), of order 2, and on knots equally
    spaced in u it is LMS(2). Any other γ is of order 1.

    A step that touches α = 0 or σ = 0 uses ε̄ = ε, and ε at such a knot is not kept. From α = 0, a
    positive μ replaces all noise.

    Permenter & Yuan 2023 (2306.04848), where σ is u.

    Args:
        gamma: γ, the extrapolation of ε: 1 is none, 2 is the paper's.
        mu: μ within [0, 1), the amount of fresh noise; above 0 the knots must fall in noise.
    """

    gamma: float = 2.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 10:
            raise ValueError(f"gamma is {self.gamma}, expected a factor within (0, 10), about 2")
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu is {self.mu}, expected an amount of fresh noise within [0, 1)")

    @property
    def order(self) -> int:
        return 2 if (self.gamma, self.mu) == (1.5, 0) else 1

    @property
    def is_direct(self) -> bool:
        """True for γ = 1. The extrapolation for other γ relies on y - u ε = x_0."""
        return self.gamma == 1

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[_LastKnot]:
        if self.mu and not is_falling(knots):
            raise ValueError(
                "fresh noise (mu > 0) needs knots that fall in noise: to invert, use mu = 0"
            )
        return super().start(x, knots, noise)

    def advance(
        self, state: State[_LastKnot], prediction: Prediction, noise: Noise
    ) -> State[_LastKnot]:
        t, s, last = state.level, state.remaining[0], state.memory
        kept = (
            (s.sigma * t.alpha / (s.alpha * t.sigma)) ** (self.mu / (1 - self.mu))
            if self.mu
            else 1.0
        )  # u_p / u_s
        x = Prediction(prediction.x0, multiply(kept, prediction.eps)).at(s)
        if last is not None and not state.is_first_order:
            change = s.alpha * (s.ratio * kept - t.ratio) * (1 - self.gamma)
            x = x + multiply(change, last.eps - prediction.eps)
        if self.mu and not is_clean(s):
            z = noise.between(t, s, state.step)
            x = x + multiply(s.sigma * (1 - kept**2) ** 0.5, z)
        return state.at_next_knot(x, _LastKnot(t, prediction.eps) if is_interior(t) else None)
