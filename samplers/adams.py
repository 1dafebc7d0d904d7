"""Adams methods, which integrate the polynomial through the last k predictions exactly.

LMS, DEIS, the flow form, iPNDM and DPM-Solver++(3M) are Adams-Bashforth methods; Adams-Moulton adds
a corrector. The probability flow is linear in each of three pairs of a coordinate and a held
quantity:

    held          coordinate         measure m     exact integral over a step
    eps           y = x/α            u = σ/α       y_s = y + ∫ ε du
    velocity      z = x/(α+σ)        a = σ/(α+σ)   z_s = z + ∫ (ε - x_0) da
    x0            x/σ                1/u           x_s/σ_s = x/σ + ∫ x_0 d(1/u)

A method holds one of them, interpolates it in a variable, and integrates the polynomial exactly
against the measure. Its first-order step holds the newest value constant.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.samplers.base import Knots, Memory, Sampler, State, is_interior, multiply
from diffcore.samplers.lagrange import (
    QuadratureRule,
    even_moments,
    gauss_legendre,
    moments,
    polynomial_correction,
)
from diffcore.schedules import Level, Real

__all__ = [
    "Adams",
    "AdamsBashforth",
    "AdamsMoulton",
    "HeldQuantity",
    "History",
    "KnotValue",
    "Variable",
    "exponential_moments",
]

HeldQuantity = Literal["eps", "x0", "velocity"]
"""What a method holds and interpolates; velocity is ε - x_0."""

Variable = Literal["u", "a", "logsnr", "t", "index"]
"""The variable of the interpolating polynomial; index counts knots."""


class KnotValue(NamedTuple):
    """The held quantity at a knot."""

    level: Level
    value: Tensor


History = tuple[KnotValue, ...]
"""The last knots, newest first."""

PAST_INDICES = range(0, -5, -1)
"""Indices of the knots of a history, counted from the newest."""


@dataclass(frozen=True)
class Adams(Sampler[Memory], ABC):
    """Base of Adams methods: integrates the polynomial through a history of the held quantity.

    Args:
        k: number of predictions that the polynomial interpolates.
        held: eps, x0, or velocity (ε - x_0).
        variable: variable of the polynomial: u, a, logsnr, t, or the step's index.
    """

    k: Literal[1, 2, 3, 4, 5] = 2
    held: HeldQuantity = "velocity"
    variable: Variable = "a"
    max_k: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.k not in range(1, self.max_k + 1):
            raise ValueError(f"k is {self.k}, expected 1 to {self.max_k} predictions")
        for name, options in (("held", HeldQuantity), ("variable", Variable)):
            if (value := getattr(self, name)) not in get_args(options):
                raise ValueError(
                    f"{name} is {value!r}, expected one of {', '.join(get_args(options))}"
                )

    @property
    def order(self) -> int:
        order = self._order_on_any_knots()
        return min(order, 2) if self.variable == "index" else order

    @abstractmethod
    def _order_on_any_knots(self) -> int:
        """Order of convergence on any knots, if the variable is not the index."""

    @property
    def _is_finite_at_ends(self) -> bool:
        """Whether variable and measure are finite from noise to data, both included."""
        return self.held == "velocity" and self.variable in ("a", "index")

    def _held_value(self, prediction: Prediction) -> Tensor:
        x0, eps = prediction
        if self.held == "velocity":
            return eps - x0
        return eps if self.held == "eps" else x0

    def _scale(self, level: Level) -> Real:
        """c, the ratio of x to the coordinate whose change is the integral of the held quantity."""
        match self.held:
            case "eps":
                return level.alpha
            case "x0":
                return level.sigma
        return level.alpha + level.sigma

    def _correction(
        self, history: History, s: Level, indices: Iterable[int] = PAST_INDICES
    ) -> Tensor | float:
        """The correction by the polynomial of the first-order step to s.

        Args:
            history: values that the polynomial interpolates; the step begins at the first knot.
            s: level at the end of the step.
            indices: index of each knot relative to the first, for the variable `index`.

        Returns:
            c_s Σ_{j≥1} w_j (f_j - f_0), of the shape of x; 0 for a history of one value.
        """
        if len(history) == 1:
            return 0.0
        nodes = [
            _coordinate(level, index, self.variable)
            for index, (level, _) in zip(indices, history, strict=False)
        ]
        moments = self._moments(history[0].level, s, len(history) - 1)
        return polynomial_correction([f for _, f in history], nodes, moments, self._scale(s))

    def _moments(self, t: Level, s: Level, count: int) -> list[Real]:
        """Moments M_1 .. M_count of the measure from t to s, in the variable.

        Args:
            t: level at the beginning of the step, the origin of the moments.
            s: level at its end.
            count: number of moments.
        """
        if self.variable == "index" or (self.held, self.variable) in (
            ("eps", "u"),
            ("velocity", "a"),
        ):
            width = _coordinate(s, 1, self.variable) - _coordinate(t, 0, self.variable)
            mass = _measure_variable(s, self.held) - _measure_variable(t, self.held)
            return even_moments(mass, width, count)
        rule = _measure_rule(t, s, self.held, self.variable)
        return moments(rule, _coordinate(t, 0, self.variable), count)


@dataclass(frozen=True)
class AdamsBashforth(Adams[History]):
    """x_s = first-order step + c_s Σ_{j=1..k-1} w_j (f_j - f_0),  w_j = ∫ ℓ_j(v) dm.

    c = α, α+σ or σ for eps, velocity or x0. The order is k on any knots; the first steps use as
    many values as exist. The variable `index` treats knots as equally spaced, also in the measure:
    this gives the classical weights, and an order of at most 2.

    A step that touches α = 0 or σ = 0 is the first-order step, and the value at such a knot is not
    kept if the variable is u or logsnr. The flow form (velocity, a) needs no exception.

    Args:
        k: number of predictions used, 1 to 5; 1 is the first-order step.
        held: quantity that is interpolated: eps, x0, or velocity (ε - x_0).
        variable: variable of the polynomial: u, a, logsnr, t, or the step's index.
    """

    @classmethod
    def lms(cls, k: Literal[1, 2, 3, 4, 5] = 4) -> "AdamsBashforth":
        """The linear multistep sampler (LMS) of k-diffusion with k values: ε over u."""
        return cls(k, "eps", "u")

    @classmethod
    def flow(cls, k: Literal[1, 2, 3, 4, 5] = 2) -> "AdamsBashforth":
        """Adams-Bashforth for rectified flows: ε - x_0 over a, k the maximum number of values."""
        return cls(k, "velocity", "a")

    @classmethod
    def deis(
        cls, k: Literal[1, 2, 3, 4, 5] = 3, variable: Literal["logsnr", "t"] = "logsnr"
    ) -> "AdamsBashforth":
        """DEIS with k values: ε over λ (ρAB in log ρ, as in diffusers) or over t (tAB-DEIS).

        Zhang & Chen 2023 (2204.13902).

        Args:
            k: largest number of values, from 1 to 5.
            variable: variable of interpolation, logsnr or t.

        Returns:
            The sampler.
        """
        return cls(k, "eps", variable)

    @classmethod
    def ipndm(cls, k: Literal[1, 2, 3, 4, 5] = 4) -> "AdamsBashforth":
        """iPNDM: ε with the classical weights of equal steps.

        Returns:
            The sampler with at most k values.

        Zhang & Chen 2023 (2204.13902), after 2202.09778.
        """
        return cls(k, "eps", "index")

    def advance(
        self, state: State[History], prediction: Prediction, noise: Noise
    ) -> State[History]:
        newest = KnotValue(state.level, self._held_value(prediction))
        history: History = (newest, *(state.memory or ()))
        knot = state.remaining[0]
        x = prediction.at(knot)
        if self._is_finite_at_ends or not state.is_first_order:
            x = x + self._correction(history, knot)
        kept = history if self._has_finite_variable(state.level) else history[1:]
        return state.at_next_knot(x, kept[: self.k - 1])

    def _order_on_any_knots(self) -> int:
        return self.k

    def _has_finite_variable(self, level: Level) -> bool:
        return self.variable in ("a", "t", "index") or is_interior(level)


class _MoultonMemory(NamedTuple):
    """Memory of `AdamsMoulton`.

    Args:
        k: number of values that this run uses.
        history: values at the last knots.
        predicted: the predictor's correction of the first-order step that led to the current knot.
    """

    k: int
    history: History = ()
    predicted: Tensor | float = 0.0


@dataclass(frozen=True)
class AdamsMoulton(Adams[_MoultonMemory]):
    """Predictor-corrector Adams method: applies x_s = first-order step + c_s Σ_j w_j (f_j - f_0)
    twice.

        predict    the polynomial through the last k values, which is AdamsBashforth(k)
        correct    the polynomial through these and the value at s: of order k+1

    c = α, α+σ or σ for eps, velocity or x0. There is one evaluation per step: x_s is corrected with
    the value at the predicted x_s, which the next step uses too. At the last knot x is predicted
    but not corrected. Hairer, Nørsett & Wanner (Solving Ordinary Differential Equations I, III.1)
    call this scheme PEC. UniPC is this method for x_0 over λ except for its secants; from the third
    step on UniPC(3) is k = 3.

    A step that touches α = 0 or σ = 0 is the first-order step of its prediction, and the value at
    such a knot is not kept. The flow form (velocity, a) needs no exception.

    A polynomial through many values far apart is inaccurate, above all under strong guidance. With
    `every`, a run of n steps uses no more than 1 + n // every values.

    Args:
        k: number of values that the predictor uses, 1 to 4; the order is k + 1, in the variable
            `index` 2.
        held: quantity that is interpolated: eps, x0, or velocity (ε - x_0).
        variable: variable of the polynomial: u, a, logsnr, t, or the step's index.
        every: number of steps for each value after the first; 0 uses k values in any run.
    """

    every: int = 0
    max_k: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0:
            raise ValueError(
                f"every is {self.every}, expected a number of steps, or 0 for k values in any run"
            )

    def start(self, x: Tensor, knots: Knots, noise: Noise) -> State[_MoultonMemory]:
        k = min(self.k, 1 + (len(knots) - 1) // self.every) if self.every else self.k
        return replace(super().start(x, knots, noise), memory=_MoultonMemory(k))

    def forget(self, state: State[_MoultonMemory]) -> State[_MoultonMemory]:
        return replace(state, memory=_MoultonMemory(state.require_memory().k))

    def advance(
        self, state: State[_MoultonMemory], prediction: Prediction, noise: Noise
    ) -> State[_MoultonMemory]:
        level, knot = state.level, state.remaining[0]
        k, past, predicted = state.require_memory()
        x = prediction.at(knot)
        if state.is_first_order and not self._is_finite_at_ends:
            return state.at_next_knot(x, _MoultonMemory(k))
        newest = KnotValue(level, self._held_value(prediction))
        if past:
            # Relative to the beginning of the last step, the newest knot has index 1.
            history: History = (past[0], newest, *past[1:])
            corrected = self._correction(history, level, (0, 1, *PAST_INDICES[1:]))
            x = x + multiply(self._scale(knot) / self._scale(level), corrected - predicted)
        history = (newest, *past)[:k]
        predicted = self._correction(history, knot)
        return state.at_next_knot(x + predicted, _MoultonMemory(k, history, predicted))

    def _order_on_any_knots(self) -> int:
        return self.k + 1


def exponential_moments(t: Level, s: Level, count: int) -> list[Real]:
    """M_p = ∫ (λ - λ_t)^p d(α/σ) from t to s, p = 1 .. count: the moments for x_0 over λ.

    Args:
        t: level at the beginning of the step.
        s: level at its end.
        count: number of moments.

    Returns:
        M_1, ..., M_count.
    """
    return moments(_measure_rule(t, s, "x0", "logsnr"), t.logsnr, count)


def _measure_rule(t: Level, s: Level, held: HeldQuantity, variable: Variable) -> QuadratureRule:
    """(v, dm) between two levels of finite λ, by quadrature in λ.

    Args:
        t: level at the beginning of the step.
        s: level at its end.
        held: held quantity, which determines the measure m.
        variable: variable v of the polynomial.
    """
    points = gauss_legendre(t.logsnr, s.logsnr, MEASURE_DENSITIES[held])
    if variable == "t":
        logsnrs = torch.stack([torch.as_tensor(q, dtype=torch.float64) for q, _ in points])
        times = t.schedule.time(logsnrs)
        v = times.tolist() if times.ndim == 1 else times.unbind()
        return zip(v, (dm for _, dm in points), strict=True)
    if variable == "logsnr":
        return points
    return [(_exp(-q / 2) if variable == "u" else 1 / (1 + _exp(q / 2)), dm) for q, dm in points]


def _exp(value: Real) -> Real:
    """e^value of a number or a map."""
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _velocity_density(logsnr: Real) -> Real:
    """da/dλ = -a (1 - a) / 2."""
    a = 1 / (1 + _exp(logsnr / 2))
    return -a * (1 - a) / 2


MEASURE_DENSITIES: dict[HeldQuantity, Callable[[Real], Real]] = {
    "eps": lambda logsnr: -_exp(-logsnr / 2) / 2,
    "x0": lambda logsnr: _exp(logsnr / 2) / 2,
    "velocity": _velocity_density,
}
"""dm/dλ for each held quantity."""


def _coordinate(level: Level, index: int, variable: Variable) -> Real:
    """Value of the polynomial's variable at a knot.

    Args:
        level: level of the knot.
        index: index of the knot, relative to the beginning of the step.
        variable: variable of interpolation.
    """
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


def _measure_variable(level: Level, held: HeldQuantity) -> Real:
    """m at a level: u, 1/u or a."""
    match held:
        case "eps":
            return level.ratio
        case "x0":
            return level.alpha / level.sigma
    return level.blend
