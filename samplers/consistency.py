"""Multistep sampling of few-step networks: to a cleaner level in one step, and fresh noise again.

A network whose pair is a point of the flow (`Process.estimate`) reaches it in one evaluation from
any distance. The samplers here go beyond the next knot and return to it with fresh noise.
"""

import math
from dataclasses import dataclass

from diffcore.core.estimate import Estimate
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.samplers.base import Sampler, State, is_clean, raise_noise
from diffcore.schedules import Level

__all__ = ["TCD", "Consistency", "check_estimate"]


@dataclass(frozen=True)
class Consistency(Sampler[None]):
    """x_s = α_s x_0 + σ_s z: to the clean end of the flow, and with fresh noise to the next knot.

    It is exact in distribution if x_0 is the clean end of the flow through x, for any knots: the
    knots determine only how errors of the network accumulate. One step is the network's x_0. On the
    knots of LCM (Luo et al. 2023, 2310.04378, Algorithm 3) it is LCM's sampler.

    Source: Song et al. 2023 (2303.01469, Algorithm 1).

    Example:
        >>> from diffcore.schedules import Flow, Trailing
        >>> sampler, knots = Consistency(), Trailing().knots(Flow(), steps=4)
        >>> sampler.evaluations(knots)
        4
    """

    order = 1

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        return ("consistency", "mean_velocity")

    def end(self, state: State[None]) -> Level:
        return _clean(state.remaining[0])

    def advance(self, state: State[None], prediction: Prediction, noise: Noise) -> State[None]:
        return _advance(state, self.end(state), prediction, noise)


@dataclass(frozen=True)
class TCD(Sampler[None]):
    """x_d = α_d x_0 + σ_d ε at t_d = (1-γ) t_s, and with fresh noise from there to the knot s:

        x_s = (α_s/α_d) x_d + √(σ_s² - (σ_d α_s/α_d)²) z

    γ = 0 adds no noise, which is DDIM's step, and γ = 1 is `Consistency`. With a network of two
    times, whose pair leads to d, it is exact in distribution for every γ; with a consistency
    network only for γ = 1, and for less noise as far as its ε is that of the flow at d. The source
    takes the index ⌊(1-γ) i⌋ of a table, which is less than one entry from t_d.

    Source: Zheng et al. 2024 (2402.19159, Algorithm 4), γ = 0.3.

    Args:
        gamma: γ within [0, 1], the share of t_s below which the step goes before noise is added.

    Raises:
        ValueError: γ is out of range.
    """

    gamma: float = 0.3
    order = 1

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}, expected a share within [0, 1]")

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        return ("consistency", "mean_velocity")

    def end(self, state: State[None]) -> Level:
        knot = state.remaining[0]
        if self.gamma == 0 or is_clean(knot):
            return knot
        return knot.schedule.level((1 - self.gamma) * knot.t) if self.gamma < 1 else _clean(knot)

    def advance(self, state: State[None], prediction: Prediction, noise: Noise) -> State[None]:
        return _advance(state, self.end(state), prediction, noise)


def _clean(knot: Level) -> Level:
    """The clean level of the schedule of a knot."""
    return knot.schedule.at(math.inf)


def _advance(state: State[None], end: Level, prediction: Prediction, noise: Noise) -> State[None]:
    """The step to `end`, and with fresh noise back to the next knot."""
    t, s = state.level, state.remaining[0]
    x = prediction.at(end)
    if end is s or is_clean(s):
        return state.at_next_knot(x)
    return state.at_next_knot(raise_noise(x, end, s, noise.between(t, s, state.step)))


def check_estimate(sampler: Sampler, process: Process) -> None:
    """Raise ValueError if a sampler reads something else from the pair than the network gives.

    Args:
        sampler: numerical integrator.
        process: process of the network.
    """
    remedies = {
        "posterior_mean": "a solver of the flow such as DDIM(), or a distilled network",
        "consistency": "Consistency(), or TCD()",
        "mean_velocity": "DDIM(), or Consistency() or TCD()",
        "encoded_mean": "DDPM(), or DDIM(eta=1.0)",
    }
    if process.estimate not in sampler.estimates:
        raise ValueError(
            f"the network's process has estimate {process.estimate}, and {sampler} works with "
            f"{' or '.join(sampler.estimates)}: use {remedies[process.estimate]}"
        )
