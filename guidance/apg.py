"""Adaptive projected guidance."""

import math
from dataclasses import dataclass
from typing import Any

from diffcore.core.prediction import Prediction
from diffcore.guidance.base import Contrast, GuidanceInput, dot, moved


@dataclass(frozen=True)
class APG(Contrast):
    """D = D_c + (w - 1)(d_⊥ + η d_∥),   m ← d + β m,   d ← m min(1, r/‖m‖),   in x_0, with d = D_c - D_ref at first.

    ‖·‖ over a row; ∥ and ⊥ are along and across D_c. The part along D_c saturates and is left out (η = 0); a negative β
    pushes against the directions of earlier evaluations; r bounds the size of an update. The memory m, not yet clipped,
    lives in the run: one update an evaluation. η = 1, β = 0, r = inf is CFG.

    Sadat et al. 2024 (2410.02416, Algorithm 1). r is an absolute norm in the paper, so it depends on the resolution: 2.5
    for 4x64x64 is `relative` 2.5/128.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ.
        reference: what to move away from.
        eta: η, share of the part along D_c that is kept.
        momentum: β within (-1, 1); the paper's models have -0.75 .. 0.
        threshold: r > 0, inf for none.
        relative: whether r is in units of √D, D the size of a row: the same at each resolution.
    """

    eta: float = 0.0
    momentum: float = -0.5
    threshold: float = math.inf
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.eta):
            raise ValueError(
                f"eta is {self.eta}, expected a finite number (0 leaves the parallel part out, 1 keeps it)"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(
                f"momentum is {self.momentum}, expected a number within (-1, 1), below 0 as published"
            )
        if not self.threshold > 0:
            raise ValueError(
                f"threshold is {self.threshold}, expected a norm above 0 (inf for none)"
            )

    @classmethod
    def edm2(cls, scale: float) -> "APG":
        """EDM2, 512 px. r as quoted in ComfyUI-APG_ImYourCFGNow#1, β from memory of Table 10, not confirmed."""
        return cls(scale, momentum=-0.75, threshold=2.5)

    @classmethod
    def dit(cls, scale: float) -> "APG":
        """DiT-XL/2, 256 px. r and β from memory of Table 10, not confirmed."""
        return cls(scale, momentum=-0.5, threshold=5.0)

    @classmethod
    def sd21(cls, scale: float) -> "APG":
        """Stable Diffusion 2.1. r and β from memory of Table 10, not confirmed."""
        return cls(scale, momentum=-0.75, threshold=7.5)

    @classmethod
    def sd3(cls, scale: float) -> "APG":
        """Stable Diffusion 3. r and β from memory, not confirmed."""
        return cls(scale, momentum=0.0, threshold=2.5)

    @classmethod
    def sdxl(cls, scale: float) -> "APG":
        """SDXL: r = 15, β = -0.5 (Table 10, quoted in diffusers#9626)."""
        return cls(scale, momentum=-0.5, threshold=15.0)

    def extrapolate(
        self, seen: GuidanceInput, reference: Prediction, scale: float, memory: Any
    ) -> tuple[Prediction, Any]:
        conditional = seen.conditional.x0
        average = conditional - reference.x0
        if memory is not None and self.momentum:
            average = average + self.momentum * memory
        norm = dot(average, average).sqrt()
        update = average * (self._radius(average[0].numel()) / norm).clamp(max=1.0).nan_to_num(1.0)
        along = dot(update, conditional) / dot(conditional, conditional)
        parallel = along.nan_to_num(0.0, 0.0, 0.0) * conditional
        change = (scale - 1) * (update - parallel + self.eta * parallel)
        return moved(seen.conditional, change, seen.step.level), average

    def _radius(self, size: int) -> float:
        return self.threshold * math.sqrt(size) if self.relative else self.threshold
