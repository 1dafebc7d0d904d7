"""A sampler is a pure state machine that integrates from knot to knot; it knows predictions and levels, and no network.

    state = sampler.start(x, knots, noise)
    while not state.done:
        state = sampler.advance(state, denoise(state.x, state.level), noise)

In y = x/α, u = σ/α the probability flow is dy/du = ε; in z = x/(α+σ), a = σ/(α+σ) it is dz/da = ε - x_0. The first-order
step is the same in all of them, x_s = α_s x_0 + σ_s ε, and that is its definition here.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.schedules import Level, Real


@dataclass(frozen=True)
class State:
    """Where a sampler is: ask the network about `x` at `level`, then advance.

    Nothing in it changes and nothing outside it is remembered, so it can be kept, copied and continued.

    Args:
        x: what the network is asked about.
        level: the noise level it is asked about; the last knot once done.
        left: the knots still to reach.
        step: number of knots left behind, which keys the noise of the step.
        memory: whatever a multistep or multistage method remembers.
    """

    x: Tensor
    level: Level
    left: tuple[Level, ...]
    step: int = 0
    memory: Any = None

    @property
    def done(self) -> bool:
        """Whether x is the result."""
        return not self.left

    @property
    def first_order(self) -> bool:
        """Whether the next step touches an end, α = 0 or σ = 0: what is smooth in u or λ takes the first-order step there."""
        return not (interior(self.level) and interior(self.left[0]))

    def reached(self, x: Tensor, memory: Any = None) -> "State":
        """The state at the next knot."""
        return State(x, self.left[0], self.left[1:], self.step + 1, memory)


class Sampler(ABC):
    """An integrator of the reverse process. Immutable: one object serves any number of runs and threads."""

    adaptive: bool = False
    """Whether it decides from the samples where to ask, and so how often."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Order of convergence on a smooth flow (for a stochastic sampler, the weak order)."""

    def start(self, x: Tensor, knots: tuple[Level, ...], noise: Noise) -> State:
        """The state at the first knot, where x is. Knots: n+1 levels, strictly monotone in λ, any ends."""
        return State(x, knots[0], knots[1:])

    @abstractmethod
    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        """The next state, given the network's prediction at (state.x, state.level)."""

    def forget(self, state: State) -> State:
        """The state at a knot where the flow has a corner, without the past: no polynomial should go through both sides."""
        return replace(state, memory=None)

    @property
    def direct(self) -> bool:
        """Whether a step is α_s x_0 + σ_s ε of its one prediction, fresh noise aside, and so takes an x_0 and an ε that do not
        make x together (CFG++).
        """
        return self.order == 1

    def uses_guidance(self, state: State) -> bool:
        """Whether guidance acts on the prediction at this state; False asks for the conditional model's own."""
        return True

    @abstractmethod
    def evaluations(self, knots: tuple[Level, ...]) -> int:
        """How many predictions a run over these knots asks for."""


class SamplerWrapper(Sampler):
    """A sampler around another, `inner`, which makes its steps: what it promises of itself is what that one does."""

    inner: Sampler

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.inner.adaptive

    @property
    def direct(self) -> bool:
        return self.inner.direct


def fresh(t: Level, s: Level) -> Real:
    """1 - u_s²/u_t² = 1 - e^(λ_t - λ_s), u = σ/α: the share of the noise at s that a step from t of DDPM draws anew.

    1 from pure noise and at the clean level. For maps of levels, 0 where both are clean.

    Raises:
        ValueError: noise rises from t to s, so there is none to replace.
    """
    gap = t.logsnr - s.logsnr
    if isinstance(gap, Tensor):
        gap = gap.masked_fill(gap.isnan(), 0.0)  # inf - inf
        _check_falling(bool((gap <= 0).all()))
        return -gap.expm1()
    _check_falling(gap <= 0)
    return -math.expm1(gap)


def _check_falling(falls: bool) -> None:
    if not falls:
        raise ValueError(
            "fresh noise needs knots that fall in noise: invert and renoise with a sampler that draws none (eta = 0)"
        )


def renoised(prediction: Prediction, share: Real, z: Tensor) -> Prediction:
    """(x_0, √(1-share) ε + √share z): this share of the variance of the noise drawn anew."""
    share = share.to(z) if isinstance(share, Tensor) else share
    return Prediction(prediction.x0, (1 - share) ** 0.5 * prediction.eps + share**0.5 * z)


def noisier(x: Tensor, here: Level, level: Level, z: Tensor) -> Tensor:
    """(α'/α) x + √(σ'² - (σ α'/α)²) z: from the marginal at a level to the one at a noisier level, exactly."""
    share = -math.expm1(float(level.logsnr) - float(here.logsnr))
    return level.alpha / here.alpha * x + level.sigma * share**0.5 * z


def clean(level: Level) -> bool:
    """Whether a whole batch has no noise there: a step to it is x_0, and draws none."""
    return isinstance(level.sigma, float) and level.sigma == 0


def interior(level: Level) -> bool:
    """Whether neither α nor σ is 0, anywhere in a map of levels, so that u and λ are finite. Decided on the host."""
    logsnr = level.logsnr
    return bool(logsnr.isfinite().all()) if isinstance(logsnr, Tensor) else math.isfinite(logsnr)


def falls(knots: tuple[Level, ...]) -> bool:
    """Whether the knots go towards the data, everywhere in maps of levels; decided on the host."""
    rises = knots[0].logsnr < knots[-1].logsnr
    return bool(rises.all()) if isinstance(rises, Tensor) else rises


def times(coefficient: Real, x: Tensor) -> Tensor:
    """The product, where the coefficient may be a map of levels in float64 on the host."""
    return (coefficient.to(x) if isinstance(coefficient, Tensor) else coefficient) * x
