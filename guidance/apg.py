"""Adaptive projected guidance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.core.prediction import Prediction, add_to_x0, dot_per_sample
from diffcore.guidance.base import Contrast, GuidanceInput, Step

__all__ = ["APG"]


@dataclass(frozen=True)
class APG(Contrast[Tensor]):
    """Adaptive projected guidance: CFG on x_0 without the part along D_c, with momentum.

        d ← D_c - D_ref,   m ← d + β m,   d ← m min(1, r/‖m‖)
        D = D_c + (w - 1)(d_⊥ + η d_∥)

    ‖·‖ is taken over each sample; d_∥ and d_⊥ are the parts of d along and across D_c. The part
    along D_c saturates the image and is left out (η = 0). A negative β pushes against the
    directions of earlier evaluations. r bounds the size of an update. The memory is m before it
    is bounded, updated at each evaluation. η = 1, β = 0, r = inf is CFG.

    Source: Sadat et al. 2024 (2410.02416, Algorithm 1). r is an absolute norm in the paper, so it
    depends on the resolution: 2.5 for 4x64x64 is 2.5/128 with `relative`.

    Args:
        scale: w ≥ 0: a number, a scale schedule, or in Python any function of λ; 1 is the
            conditional model, at one evaluation.
        reference: prediction to extrapolate away from; by default the unconditional one.
        eta: η, share of the part along D_c that is kept; 0 removes it, 1 keeps it.
        momentum: β within (-1, 1); the models of the paper use -0.75 .. 0.
        threshold: r > 0, the largest norm of an update; inf for no bound.
        relative: state r in units of √n, n the number of elements of a sample, so that it has the
            same effect at each resolution.
    """

    eta: float = 0.0
    momentum: float = -0.5
    threshold: float = math.inf
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.eta):
            raise ValueError(
                f"eta is {self.eta}, expected a finite number (0 removes the parallel part, 1 "
                "keeps it)"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(
                f"momentum is {self.momentum}, expected a number within (-1, 1), below 0 as "
                "published"
            )
        if not self.threshold > 0:
            raise ValueError(
                f"threshold is {self.threshold}, expected a norm above 0 (inf for no bound)"
            )

    @property
    def depends_on_steps(self) -> bool:
        return self.momentum != 0

    @classmethod
    def sdxl(cls, scale: float) -> "APG":
        """The setting for Stable Diffusion XL: r = 15, β = -0.5.

        Source: Table 10 of the paper, as quoted in diffusers#9626.

        Returns:
            The rule with this setting and the given scale w.
        """
        return cls(scale, momentum=-0.5, threshold=15.0)

    def traceable(self, step: Step) -> "APG":
        return self.with_scale_at(step)

    def first_memory(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def extrapolate(
        self, inputs: GuidanceInput, reference: Prediction, scale: float, memory: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        conditional = inputs.conditional.x0
        average = conditional - reference.x0
        if memory is not None and self.momentum:
            average = average + self.momentum * memory
        norm = dot_per_sample(average, average).sqrt()
        # 0/0 where both predictions agree: the update is 0, and any factor serves.
        update = average * (self._radius(average[0].numel()) / norm).clamp(max=1.0).nan_to_num(1.0)
        along = dot_per_sample(update, conditional) / dot_per_sample(conditional, conditional)
        parallel = along.nan_to_num(0.0, 0.0, 0.0) * conditional
        change = (scale - 1) * (update - parallel + self.eta * parallel)
        return add_to_x0(inputs.conditional, change, inputs.step.level), average

    def _radius(self, size: int) -> float:
        """r as an absolute norm, for samples of `size` elements."""
        return self.threshold * math.sqrt(size) if self.relative else self.threshold
