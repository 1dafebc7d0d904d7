"""Reward fine-tuning of a few-step student by first-order gradients.

    L = -R(x_0) + β Σ_i D_f(π_θ(x_{i+1} | x_i) ‖ π_ref(x_{i+1} | x_i)),   the student's own steps

A step of the multistep sampler is π(x_s | x_t) = N(α_s G(x_t), σ_s² I), so that every divergence is
a function of δ² = α_s² |G_θ - G_ref|² / σ_s². The gradient passes through all steps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import LabelWrapper
from diffcore.core.process import Process
from diffcore.distillation.matching.student import StudentObjective, rollout_noise
from diffcore.distillation.teacher import RunTeacher
from diffcore.objectives.draw import Draw
from diffcore.objectives.networks import Networks
from diffcore.samplers.base import is_clean
from diffcore.schedules import Level

__all__ = ["GaussianDivergence", "Reward", "RewardTuning", "gaussian_divergence"]

Reward = Callable[[Tensor], Tensor]
"""Maps samples x_0 (B, *shape) to rewards (B,), differentiably; a larger reward is better."""
GaussianDivergence = Literal["kl", "jeffreys", "hellinger", "js"]
NODES = 64
"""Number of nodes of the quadrature of the Jensen-Shannon divergence."""
ROUNDING = 1e-12


@dataclass(frozen=True)
class RewardTuning(StudentObjective):
    """ROCM: a reward is maximised while an f-divergence keeps the student near a reference.

    The equation is that of the module; the source was read as far as its abstract, and the level
    of the last step, which has no noise, is a choice of this library. The loss of a reference
    without a reward is 0.

    Source: Shekhar & Zhang 2025 (ROCM, 2503.06171).

    Args:
        reference: run of the student before the tuning, with the same process; start from its
            weights too (`init`).
        reward: function of x_0, by its import path in settings, which need its annotation:
            `def reward(x0: Tensor) -> Tensor`.
        strength: β, positive.
        divergence: kl (δ²/2), jeffreys (δ²), hellinger (1 - exp(-δ²/8)), or js.
        end: σ/α of the divergence of the last step.

    Raises:
        ValueError: a field is out of range.
    """

    _: KW_ONLY
    reference: RunTeacher
    reward: Reward
    strength: float = 1.0
    divergence: GaussianDivergence = "kl"
    end: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.reward):
            raise ValueError(
                f"reward is {self.reward!r}, expected a function of x_0, by its import path in "
                "settings: def reward(x0: Tensor) -> Tensor"
            )
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength is {self.strength}, expected a positive number")
        if self.divergence not in get_args(GaussianDivergence):
            raise ValueError(
                f"divergence is {self.divergence!r}, expected one of "
                f"{', '.join(get_args(GaussianDivergence))}"
            )
        if not 0 < self.end < math.inf:
            raise ValueError(f"end is {self.end}, expected a positive ratio σ/α")

    @property
    def content_hash(self) -> str:
        return self.reference.content_hash

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the process is not that of the reference, or not that of a student.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        super().check(process, inputs)
        own, other = process, self.reference.process
        different = [f.name for f in fields(own) if getattr(own, f.name) != getattr(other, f.name)]
        if different:
            raise ValueError(
                f"process.{different[0]} of the student is {getattr(own, different[0])}, but that "
                f"of the reference is {getattr(other, different[0])}: use the reference's process"
            )

    def networks(
        self, denoiser: Denoiser, device: torch.device, label_wrapper: LabelWrapper
    ) -> Networks:
        self._check_reward(denoiser.process, device)
        return Networks(self.reference.denoiser(device, None, label_wrapper))

    def _check_reward(self, process: Process, device: torch.device) -> None:
        """Raise ValueError if the reward of two samples has another shape, or no gradient."""
        x0 = torch.zeros(2, *process.shape, device=device, requires_grad=True)
        with torch.random.fork_rng(), torch.enable_grad():
            rewards = self._rewards(x0)
        if not rewards.requires_grad:
            raise ValueError(
                "the reward has no gradient, with which the student would only stay near the "
                "reference: compute it differentiably from x_0, without detach or no_grad"
            )

    def student_losses(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        assert networks.teacher is not None
        knots = self.student.knots(denoiser.process.schedule)
        x, total = self.student.start(denoiser.process, draw), torch.zeros((), device=x0.device)
        sample = x
        for index, t in enumerate(knots[:-1]):
            sample = denoiser(x, t, condition).x0
            other = networks.teacher(x, t, condition).x0
            s = knots[index + 1]
            at = s.schedule.at(-2 * math.log(self.end)) if is_clean(s) else s
            total = total + self._divergence(sample - other, at)
            if not is_clean(s):
                x = s.alpha * sample + s.sigma * rollout_noise(draw, index + 1)
        return self.strength * total - self._rewards(sample)

    def _divergence(self, difference: Tensor, level: Level) -> Tensor:
        ratio = float(level.alpha) / float(level.sigma)
        square = ratio**2 * difference.square().flatten(1).sum(1)
        return gaussian_divergence(square, self.divergence)

    def _rewards(self, sample: Tensor) -> Tensor:
        rewards = self.reward(sample)
        if not isinstance(rewards, Tensor):
            raise ValueError(
                f"the reward is a {type(rewards).__name__}, expected a tensor: return one number "
                "for each sample"
            )
        if rewards.shape != (len(sample),):
            raise ValueError(
                f"the reward of {len(sample)} samples has shape {tuple(rewards.shape)}, expected "
                f"({len(sample)},): return one number for each sample"
            )
        return rewards


def gaussian_divergence(square: Tensor, name: GaussianDivergence) -> Tensor:
    """A divergence of N(m_1, σ² I) and N(m_2, σ² I), of the shape of δ².

    The Jensen-Shannon divergence is that of half of both Kullback-Leibler divergences to the mean,
    ln 2 - E softplus(-δ²/2 - δ y) with y ~ N(0, 1), by Gauss-Hermite quadrature.

    Args:
        square: δ² = |m_1 - m_2|² / σ², any shape.
        name: kl, jeffreys, hellinger or js.

    Returns:
        The divergence, differentiable at δ = 0 too.
    """
    match name:
        case "kl":
            return square / 2
        case "jeffreys":
            return square
        case "hellinger":
            return -torch.expm1(-square / 8)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    y, w = (torch.from_numpy(v).to(square) for v in (nodes, weights / weights.sum()))
    delta = (square + ROUNDING).sqrt()[..., None]
    return math.log(2) - (softplus(-(delta**2) / 2 - delta * y) * w).sum(-1)
