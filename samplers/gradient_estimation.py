"""Gradient estimation: ε is extrapolated beyond the last two predictions, as a better estimate of the way to the data."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, falls, interior, times
from diffcore.schedules import Level


class _Last(NamedTuple):
    level: Level
    eps: Tensor


@dataclass(frozen=True)
class GradientEstimation(Sampler):
    """y_s = y + (u_p - u) ε̄ + √(u_s² - u_p²) z,  ε̄ = γ ε + (1-γ) ε',  u_p = (u_s / u^μ)^{1/(1-μ)},  ε' the last knot's.

    Permenter & Yuan 2023 (2306.04848): σ there is u. μ = 0 is deterministic, u_p = u_s; γ = 1, μ = ½ is DDPM's ancestral
    step. γ = 1.5 is iPNDM(2), of order 2, and on knots equally spaced in u LMS(2); any other γ is of order 1.

    A step that touches α = 0 or σ = 0 takes ε̄ = ε, and such a knot is not remembered. From α = 0, μ > 0 renoises in full.

    Args:
        gamma: γ, 1 for none; the paper's is 2.
        mu: μ within [0, 1); above 0 the knots must fall in noise.
    """

    gamma: float = 2.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 10:
            raise ValueError(f"gamma is {self.gamma}, expected a factor within (0, 10), about 2")
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu is {self.mu}, expected a share of fresh noise within [0, 1)")

    @property
    def order(self) -> int:
        return 2 if (self.gamma, self.mu) == (1.5, 0) else 1

    @property
    def direct(self) -> bool:
        """Only without extrapolation, which moves ε and counts on y - u ε being x_0."""
        return self.gamma == 1

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        if self.mu and not falls(knots):
            raise ValueError(
                "fresh noise (mu > 0) needs knots that fall in noise: invert with mu = 0"
            )
        return super().start(x, knots, noise)

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        t, s, last = state.level, state.left[0], state.memory
        kept = (
            (s.sigma * t.alpha / (s.alpha * t.sigma)) ** (self.mu / (1 - self.mu))
            if self.mu
            else 1.0
        )  # u_p / u_s
        x = Prediction(prediction.x0, times(kept, prediction.eps)).at(s)
        if last is not None and not state.first_order:
            change = s.alpha * (s.ratio * kept - t.ratio) * (1 - self.gamma)
            x = x + times(change, last.eps - prediction.eps)
        if self.mu:
            x = x + times(s.sigma * (1 - kept**2) ** 0.5, noise.step(state.step))
        return state.reached(x, _Last(t, prediction.eps) if interior(t) else None)

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1
