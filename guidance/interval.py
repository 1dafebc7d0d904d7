"""Guidance in an interval of noise levels."""

import math
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import Guidance, GuidanceInput, GuidanceWrapper, Step
from diffcore.guidance.reference import Reference

__all__ = ["Interval"]

BoundVariable = Literal["sigma", "logsnr"]

BOUND_TOLERANCE = 1e-9
"""Difference in λ below which a knot lies on a bound."""


@dataclass(frozen=True)
class Interval(GuidanceWrapper[Any]):
    """Interval applies the rule inside at middle noise levels, and the conditional model elsewhere.

        low < σ/α ≤ high   at the noisier end of a step

    Source: Kynkäänniemi et al. 2024 (2404.07724), half-open as published. The step decides and not
    the level of the evaluation, so both evaluations of a second-order step are in the same mode.
    `sample` adds both bounds to the knots, so the interval is exact on each grid. Outside it a step
    costs one evaluation. Published: (0.19, 1.61] for EDM2-XXL on ImageNet-512 (w = 2.0, latents of
    standard deviation 0.5), (0.28, 5.42] for SDXL (w = 16). The memory is that of the rule inside.

        Interval(APG(4.0), sigma=(0.19, 1.61))   is   Interval(APG(4.0), 0.19, 1.61, "sigma")
        Interval(CFG(2.0), logsnr=(-1.0, 3.0))   is   Interval(CFG(2.0), -1.0, 3.0, "logsnr")

    Args:
        inner: rule that is applied inside the interval.
        low: lower bound, of σ/α (the bound itself is outside) or of λ (the bound itself is inside);
            None for no bound.
        high: upper bound, of σ/α (the bound itself is inside) or of λ (the bound itself is
            outside); None for no bound.
        variable: quantity that the bounds limit: sigma is σ/α, logsnr is λ.
        sigma_data: standard deviation of the data for which bounds of σ/α are stated, such as 0.5
            for EDM2; they are multiplied by the deviation of the process over it. None leaves them.
        sigma: (low, high) of σ/α, in place of `low` and `high`.
        logsnr: (low, high) of λ, in place of `low` and `high`.
    """

    low: float | None = None
    high: float | None = None
    variable: BoundVariable = "sigma"
    sigma_data: float | None = None
    sigma: InitVar[tuple[float, float] | None] = None
    logsnr: InitVar[tuple[float, float] | None] = None

    incompatible_rules: ClassVar[dict[str, str]] = {
        "LinearAG": "steps outside the interval leave gaps in its history; use LinearAG alone, or "
        "Interval alone",
    }

    def __post_init__(
        self, sigma: tuple[float, float] | None, logsnr: tuple[float, float] | None
    ) -> None:
        super().__post_init__()
        self._set_bounds("sigma", sigma)
        self._set_bounds("logsnr", logsnr)
        # A missing bound is the end of the axis.
        minimum = 0.0 if self.variable == "sigma" else -math.inf
        low = minimum if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        if self.variable not in get_args(BoundVariable):
            raise ValueError(f"variable is {self.variable!r}, expected sigma (σ/α) or logsnr (λ)")
        if not minimum <= low < high:
            raise ValueError(
                f"low and high are {low} and {high}, expected {minimum:g} ≤ low < high of "
                f"{'σ/α' if self.variable == 'sigma' else 'λ'}: swap them, or leave Interval out"
            )
        if self.sigma_data is not None and (
            self.variable == "logsnr" or not 0 < self.sigma_data < math.inf
        ):
            raise ValueError(
                f"sigma_data is {self.sigma_data}, expected a positive standard deviation, and "
                "bounds of sigma: leave it out"
            )

    def _set_bounds(self, variable: BoundVariable, bounds: tuple[float, float] | None) -> None:
        """Set low, high and variable from a pair of bounds, if there is one."""
        if bounds is None:
            return
        if self.low is not None or self.high is not None:
            raise ValueError(
                f"{variable} is {bounds} beside other bounds: give sigma, logsnr, or low and high"
            )
        for name, value in zip(("low", "high", "variable"), (*bounds, variable), strict=True):
            object.__setattr__(self, name, value)

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return self.inner.required_references(step, memory) if self._contains(step) else ()

    def combine(self, inputs: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        if not self._contains(inputs.step):
            return inputs.conditional, memory
        return self.inner.combine(inputs, memory)

    def traceable(self, step: Step) -> Guidance[Any] | None:
        return self.inner.traceable(step)

    def first_memory(self, x: Tensor) -> Any:
        return self.inner.first_memory(x)

    def levels(self, process: Process) -> tuple[float, ...]:
        return (
            *(bound for bound in self._logsnr_bounds(process) if math.isfinite(bound)),
            *self.inner.levels(process),
        )

    def _contains(self, step: Step) -> bool:
        noisy, clean = self._logsnr_bounds(step.process)
        logsnr = float(step.noisier_end.logsnr)
        return noisy - BOUND_TOLERANCE <= logsnr < clean - BOUND_TOLERANCE

    def _logsnr_bounds(self, process: Process) -> tuple[float, float]:
        """λ of the noisy bound and of the clean bound."""
        low, high = self.low, self.high
        assert low is not None  # set at construction
        assert high is not None
        if self.variable == "logsnr":
            return low, high
        unit = 1.0 if self.sigma_data is None else process.sigma_data / self.sigma_data
        return _logsnr(high * unit), _logsnr(low * unit)


def _logsnr(sigma: float) -> float:
    """λ at σ/α = sigma; inf at 0, -inf at inf."""
    return -2 * math.log(sigma) if sigma else math.inf
