"""Guidance in an interval of noise levels."""

import math
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, get_args

from diffcore.core.prediction import Prediction
from diffcore.core.process import Process
from diffcore.guidance.base import GuidanceInput, GuidanceWrapper, Step
from diffcore.guidance.reference import Reference

TOLERANCE = 1e-9
"""In λ: knots nearer than this to a bound are on it."""


@dataclass(frozen=True)
class Interval(GuidanceWrapper):
    """The rule inside where low < σ/α ≤ high at the noisier end of a step; elsewhere the conditional model, one evaluation.

    Kynkäänniemi et al. 2024 (2404.07724), half-open as published. The step decides, not the level asked about, so both
    evaluations of a second-order step are of one mode. `sample` makes both bounds knots, so that the interval is what was
    asked for on every grid. Published: (0.19, 1.61] for EDM2-XXL on ImageNet-512 (w = 2.0, latents of standard deviation
    0.5), (0.28, 5.42] for SDXL (w = 16).

        Interval(APG(4.0), sigma=(0.19, 1.61))    is    Interval(APG(4.0), low=0.19, high=1.61)
        Interval(CFG(2.0), logsnr=(-1, 3))        is    Interval(CFG(2.0), low=-1, high=3, variable="logsnr")

    Args:
        inner: the rule inside.
        low: lower bound of σ/α, outside; for λ the noisier bound, inside.
        high: upper bound of σ/α, inside; for λ the cleaner bound, outside.
        variable: what the bounds are of: sigma is σ/α, logsnr is λ.
        sigma_data: standard deviation of the data for which σ/α is stated, such as 0.5 for EDM2; the bounds are scaled by
            the process's over it. None takes σ/α of the process as it is.
        sigma: (low, high) of σ/α, in place of both.
        logsnr: (low, high) of λ, in place of both.
    """

    low: float | None = None
    high: float | None = None
    variable: Literal["sigma", "logsnr"] = "sigma"
    sigma_data: float | None = None
    sigma: InitVar[tuple[float, float] | None] = None
    logsnr: InitVar[tuple[float, float] | None] = None

    refuses: ClassVar[dict[str, str]] = {
        "LinearAG": "steps outside the interval leave gaps in its history; use LinearAG alone, or Interval alone",
    }

    def __post_init__(
        self, sigma: tuple[float, float] | None, logsnr: tuple[float, float] | None
    ) -> None:
        super().__post_init__()
        self._take("sigma", sigma)
        self._take("logsnr", logsnr)
        self._fill()
        self._check()

    def _take(self, variable: str, bounds: tuple[float, float] | None) -> None:
        if bounds is None:
            return
        if self.low is not None or self.high is not None:
            raise ValueError(
                f"{variable} is {bounds} beside other bounds: give sigma, logsnr, or low and high"
            )
        for name, value in zip(("low", "high", "variable"), (*bounds, variable), strict=True):
            object.__setattr__(self, name, value)

    def _fill(self) -> None:
        """A bound left out is the end of the axis."""
        least = 0.0 if self.variable == "sigma" else -math.inf
        object.__setattr__(self, "low", least if self.low is None else self.low)
        object.__setattr__(self, "high", math.inf if self.high is None else self.high)

    def _check(self) -> None:
        if self.variable not in get_args(Literal["sigma", "logsnr"]):
            raise ValueError(f"variable is {self.variable!r}, expected sigma (σ/α) or logsnr (λ)")
        least = 0.0 if self.variable == "sigma" else -math.inf
        if not least <= self.low < self.high:  # type: ignore[operator]
            raise ValueError(
                f"low and high are {self.low} and {self.high}, expected {least:g} ≤ low < high of "
                f"{'σ/α' if self.variable == 'sigma' else 'λ'}: swap them, or leave Interval out"
            )
        if self.sigma_data is not None and (
            self.variable == "logsnr" or not 0 < self.sigma_data < math.inf
        ):
            raise ValueError(
                f"sigma_data is {self.sigma_data}, expected a positive standard deviation, and bounds of sigma: leave it out"
            )

    def required_references(self, step: Step, memory: Any) -> tuple[Reference, ...]:
        return self.inner.required_references(step, memory) if self._inside(step) else ()

    def combine(self, seen: GuidanceInput, memory: Any) -> tuple[Prediction, Any]:
        return (
            self.inner.combine(seen, memory)
            if self._inside(seen.step)
            else (seen.conditional, memory)
        )

    def levels(self, process: Process) -> tuple[float, ...]:
        return (
            *(bound for bound in self._bounds(process) if math.isfinite(bound)),
            *self.inner.levels(process),
        )

    def _inside(self, step: Step) -> bool:
        noisy, clean = self._bounds(step.process)
        return noisy - TOLERANCE <= float(step.noisier.logsnr) < clean - TOLERANCE

    def _bounds(self, process: Process) -> tuple[float, float]:
        """λ of the noisy bound and of the clean one."""
        low, high = self.low, self.high
        assert low is not None  # filled at construction
        assert high is not None
        if self.variable == "logsnr":
            return low, high
        unit = 1.0 if self.sigma_data is None else process.sigma_data / self.sigma_data
        return -2 * math.log(high * unit) if high < math.inf else -math.inf, _logsnr(low * unit)


def _logsnr(sigma: float) -> float:
    return -2 * math.log(sigma) if sigma else math.inf
