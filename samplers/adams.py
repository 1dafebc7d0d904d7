"""Adams methods: integrate the polynomial through the last k predictions. LMS, DEIS, the flow form, iPNDM, DPM-Solver++(3M).

The probability flow is linear in each of three pairs of a coordinate and what is held fixed in it:

    held          coordinate         measure m     exact integral over a step
    eps           y = x/α            u = σ/α       y_s = y + ∫ ε du
    velocity      z = x/(α+σ)        a = σ/(α+σ)   z_s = z + ∫ (ε - x_0) da
    x0            x/σ                1/u           x_s/σ_s = x/σ + ∫ x_0 d(1/u)

A method holds one of them, interpolates it in a variable, and integrates the polynomial exactly against the measure.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Sampler, State, interior, times
from diffcore.samplers.lagrange import Rule, even_moments, moments, rule, weights
from diffcore.schedules import Level, Real

Held = Literal["eps", "x0", "velocity"]
Variable = Literal["u", "a", "logsnr", "t", "index"]


class Past(NamedTuple):
    """What was held at a knot."""

    level: Level
    value: Tensor


History = tuple[Past, ...]
"""The last knots, newest first."""

PAST = range(0, -5, -1)


@dataclass(frozen=True)
class Adams(Sampler, ABC):
    """What is held, in which variable, and the integral over a step of the polynomial through a history of it."""

    k: Literal[1, 2, 3, 4, 5] = 2
    held: Held = "velocity"
    variable: Variable = "a"
    most: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.k not in range(1, self.most + 1):
            raise ValueError(f"k is {self.k}, expected 1 to {self.most} predictions")
        if self.held not in get_args(Held):
            raise ValueError(f"held is {self.held!r}, expected one of {', '.join(get_args(Held))}")
        if self.variable not in get_args(Variable):
            raise ValueError(
                f"variable is {self.variable!r}, expected one of {', '.join(get_args(Variable))}"
            )

    @property
    def order(self) -> int:
        order = self._order()
        return min(order, 2) if self.variable == "index" else order

    @abstractmethod
    def _order(self) -> int:
        """Of convergence on any knots, where the variable is not the index."""

    def evaluations(self, knots: tuple[Level, ...]) -> int:
        return len(knots) - 1

    @property
    def _everywhere(self) -> bool:
        """Whether variable and measure are finite from noise to data, both included."""
        return self.held == "velocity" and self.variable in ("a", "index")

    def _held(self, prediction: Prediction) -> Tensor:
        x0, eps = prediction
        return {"eps": eps, "x0": x0}[self.held] if self.held != "velocity" else eps - x0

    def _scale(self, level: Level) -> Real:
        """C: x over the coordinate in which the flow is the integral of what is held."""
        match self.held:
            case "eps":
                return level.alpha
            case "x0":
                return level.sigma
        return level.alpha + level.sigma

    def _correction(
        self, history: History, s: Level, places: Iterable[int] = PAST
    ) -> Tensor | float:
        """What the polynomial adds to the first-order step from the history's first knot, the others being so many knots on."""
        (t, f), *past = history
        if not past:
            return 0.0
        scale = self._scale(s)
        nodes = [
            _coordinate(level, place, self.variable)
            for place, (level, _) in zip(places, history, strict=False)
        ]
        w = weights(nodes, self._moments(t, s, len(past)))
        return sum(times(scale * w_j, f_j - f) for w_j, (_, f_j) in zip(w, past, strict=True))

    def _moments(self, t: Level, s: Level, count: int) -> list[Real]:
        """Of the measure of the held quantity, over the variable, from t to s."""
        if self.variable == "index" or (self.held, self.variable) in (
            ("eps", "u"),
            ("velocity", "a"),
        ):
            width = _coordinate(s, 1, self.variable) - _coordinate(t, 0, self.variable)
            return even_moments(_measured(s, self.held) - _measured(t, self.held), width, count)
        return moments(
            _in_logsnr(t, s, self.held, self.variable), _coordinate(t, 0, self.variable), count
        )


@dataclass(frozen=True)
class AdamsBashforth(Adams):
    """x_s = first-order step + c_s Σ_{j=1..k-1} w_j (f_j - f_0),  w_j = ∫ ℓ_j(v) dm; c = α, α+σ or σ for eps, velocity or x0.

    Of the same order k on any knots; the first steps have a shorter memory. In the variable `index` the knots count as
    equally spaced, in the measure too: classical weights, and order 2 at most.

    A step that touches α = 0 or σ = 0 is the first-order step, and such a knot is not remembered in u or logsnr. The flow
    form (velocity, a) needs no exception.

    Args:
        k: predictions used, 1 to 5; 1 is the first-order step.
        held: eps, x0, or velocity (ε - x_0).
        variable: what the held quantity is a polynomial of: u, a, logsnr, t, or the step's index.
    """

    @classmethod
    def lms(cls, k: Literal[1, 2, 3, 4, 5] = 4) -> "AdamsBashforth":
        """Linear multistep of k-diffusion: ε over u."""
        return cls(k, "eps", "u")

    @classmethod
    def flow(cls, k: Literal[1, 2, 3, 4, 5] = 2) -> "AdamsBashforth":
        """ε - x_0 over a: what a rectified flow's velocity is."""
        return cls(k, "velocity", "a")

    @classmethod
    def deis(
        cls, k: Literal[1, 2, 3, 4, 5] = 3, variable: Literal["logsnr", "t"] = "logsnr"
    ) -> "AdamsBashforth":
        """DEIS: ε over λ (ρAB in log ρ, as in diffusers), or over t (tAB-DEIS). Zhang & Chen 2023 (2204.13902)."""
        return cls(k, "eps", variable)

    @classmethod
    def ipndm(cls, k: Literal[1, 2, 3, 4, 5] = 4) -> "AdamsBashforth":
        """iPNDM: ε with the classical weights of equal steps. Zhang & Chen 2023 (2204.13902), after 2202.09778."""
        return cls(k, "eps", "index")

    def advance(self, state: State, prediction: Prediction, noise: Noise) -> State:
        now = Past(state.level, self._held(prediction))
        history: History = (now, *(state.memory or ()))
        x = prediction.at(state.left[0])
        if self._everywhere or not state.first_order:
            x = x + self._correction(history, state.left[0])
        remembered = history if self._remembers(state.level) else history[1:]
        return state.reached(x, remembered[: self.k - 1])

    def _order(self) -> int:
        return self.k

    def _remembers(self, level: Level) -> bool:
        return self.variable in ("a", "t", "index") or interior(level)


def exponential_moments(t: Level, s: Level, count: int) -> list[Real]:
    """M_p = ∫ (λ - λ_t)^p d(α/σ): what holding x_0 over λ asks for."""
    return moments(_in_logsnr(t, s, "x0", "logsnr"), t.logsnr, count)


def _in_logsnr(t: Level, s: Level, held: Held, variable: Variable) -> Rule:
    """(v, dm) between two finite levels, by quadrature in λ."""
    points = rule(t.logsnr, s.logsnr, DENSITIES[held])
    if variable == "t":
        times_ = t.schedule.time(
            torch.stack([torch.as_tensor(q, dtype=torch.float64) for q, _ in points])
        )
        v = times_.tolist() if times_.ndim == 1 else times_.unbind()
        return zip(v, (dm for _, dm in points), strict=True)
    if variable == "logsnr":
        return points
    return [(exp(-q / 2) if variable == "u" else 1 / (1 + exp(q / 2)), dm) for q, dm in points]


def exp(value: Real) -> Real:
    """e^value of a number or a map."""
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _a_density(logsnr: Real) -> Real:
    a = 1 / (1 + exp(logsnr / 2))
    return -a * (1 - a) / 2


DENSITIES: dict[Held, Callable[[Real], Real]] = {
    "eps": lambda logsnr: -exp(-logsnr / 2) / 2,
    "x0": lambda logsnr: exp(logsnr / 2) / 2,
    "velocity": _a_density,
}
"""dm/dλ."""


def _coordinate(level: Level, index: int, variable: Variable) -> Real:
    match variable:
        case "u":
            return level.ratio
        case "a":
            return level.blend
        case "t":
            return level.t
        case "index":
            return float(index)
    return level.logsnr


def _measured(level: Level, held: Held) -> Real:
    """The measure's variable at a level."""
    match held:
        case "eps":
            return level.ratio
        case "x0":
            return level.alpha / level.sigma
    return level.blend
