"""The learning rate, a function of the optimizer step: a resumed run has nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["LearningRate", "Shape"]

Shape = Literal["constant", "cosine", "rsqrt"]


@dataclass(frozen=True)
class LearningRate:
    """A linear warmup to a peak, and a decay.

        lr(step) = peak · min(1, (step+1)/warmup) · shape

        constant:  1
        cosine:    (1 + cos(π s)) / 2,   s = (step - warmup) / (steps - warmup)
        rsqrt:     1 / √max(step / hold, 1)     (EDM2, 2312.02696, eq. 67)

    Args:
        peak: largest learning rate.
        warmup: number of optimizer steps over which the learning rate rises linearly.
        shape: decay after the warmup: constant (none), cosine (to 0 at the end of the run), or
            rsqrt (inverse square root of the step).
        hold: number of steps after which rsqrt begins to decrease; the other shapes ignore it.
    """

    peak: float = 1e-3
    warmup: int = 100
    shape: Shape = "constant"
    hold: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise ValueError(f"peak is {self.peak}, expected a positive finite learning rate")
        if self.warmup < 0 or self.hold < 1:
            raise ValueError(
                f"warmup and hold are {self.warmup} and {self.hold}, expected warmup ≥ 0 and hold "
                "≥ 1"
            )
        if self.shape not in get_args(Shape):
            raise ValueError(
                f"shape is {self.shape!r}, expected one of {', '.join(get_args(Shape))}"
            )

    def __call__(self, step: int, steps: int) -> float:
        """The learning rate of an optimizer step.

        Args:
            step: index of the step, from 0.
            steps: number of steps of the run.

        Returns:
            The learning rate, at most `peak`.
        """
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        match self.shape:
            case "constant":
                return self.peak * rise
            case "cosine":
                progress = max(step - self.warmup, 0) / max(steps - self.warmup, 1)
                return self.peak * rise * (1 + math.cos(math.pi * min(progress, 1))) / 2
            case "rsqrt":
                return self.peak * rise / max(step / self.hold, 1) ** 0.5
