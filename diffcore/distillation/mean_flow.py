"""MeanFlow: networks of two times that give the mean velocity between two levels of a flow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffcore.core.conditions import without
from diffcore.core.denoiser import Denoiser
from diffcore.core.estimate import Estimate
from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.distillation.consistency import check_continuous
from diffcore.distillation.derivative import Derivative
from diffcore.distillation.few_step import FewStepObjective, NoisySample, RandomState
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.sampling.loop import evaluation_mode
from diffcore.schedules import Level

__all__ = ["MeanFlow"]


@dataclass(frozen=True)
class MeanFlow(FewStepObjective):
    """The MeanFlow identity, with U = ε - x_0 of the network's pair between the levels t and r:

        z = x/(α+σ),   a = σ/(α+σ),   v = dz/da = ε - x_0
        L = |U - sg(v - (a_t - a_r) dU/da)|² / (|·|² + c)^p,   dU/da = v ∂U/∂z + ∂U/∂a

    where v is that of the data, or of the teacher's pair. t and r are the noisier and the cleaner
    one of two draws of the schedule; a share of the samples has r = t, where U is the velocity.
    Without a teacher, the velocity is guided as a mixture with the network's own,

        v_w = ω v + κ U(z, t, t | condition) + (1 - ω - κ) U(z, t, t | none)

    for samples that keep their condition: the guidance scale is ω/(1-κ), and sampling costs one
    evaluation. With a teacher, its own guidance does this.

    The exact mean velocity has no loss with an exact teacher. From data its gradient has mean zero
    for p = 0; p > 0 weights a sample by its own error, which shifts the mean.

    Source: Geng et al. 2025 (2505.13447, Algorithm 1, eq. 20-22), with the levels of the schedule
    Normal.logit_normal(-0.4, 1.0), p = 1, a share 0.25 of r ≠ t, and c of the authors' code.

    Args:
        share: share of the samples with r ≠ t, in (0, 1].
        derivative: how dU/da is computed.
        power: p ≥ 0 of the adaptive weight; 0 for the squared error.
        floor: c > 0 of the adaptive weight, in squared units of the data, summed over elements.
        omega: ω > 0; 1 without guidance.
        kappa: κ within [0, 1).

    Raises:
        ValueError: a field is out of range, or one that this objective does not read is given, or
            the guidance is combined with a teacher.
    """

    share: float = 0.25
    derivative: Derivative = field(default_factory=Derivative)
    power: float = 1.0
    floor: float = 0.01
    omega: float = 1.0
    kappa: float = 0.0

    ESTIMATE: ClassVar[Estimate] = "mean_velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, expected a share of samples within (0, 1]")
        if not 0 <= self.power < math.inf or not 0 < self.floor < math.inf:
            raise ValueError(
                f"power and floor are {self.power} and {self.floor}, expected power ≥ 0, floor > 0"
            )
        if not 0 < self.omega < math.inf or not 0 <= self.kappa < 1:
            raise ValueError(
                f"omega and kappa are {self.omega} and {self.kappa}, expected omega > 0 and kappa "
                "within [0, 1)"
            )
        if self.teacher is not None and self.is_guided:
            raise ValueError(
                "omega and kappa guide the velocity of the data, and teacher is given: set the "
                "guidance of the teacher instead"
            )

    @property
    def is_guided(self) -> bool:
        """Whether the velocity is a mixture with the network's own."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        super().check(process, inputs)
        check_continuous(process, self)
        if self.is_guided and not all(process.dropouts.values() or [0.0]):
            raise ValueError(
                "omega and kappa guide away from the network without its condition, and the "
                "process drops none: set its dropout, such as 0.1, or omega: 1 and kappa: 0"
            )

    def draw(
        self,
        process: Process,
        key: SampleKey,
        device: torch.device | None = None,
        state: ResamplerState | None = None,
    ) -> Draw:
        draw = super().draw(process, key, device, state)
        second, choice = uniform(key.seed, Stream.END_LEVEL, key.position, 2).unbind(1)
        shape = (-1, *[1] * len(process.shape))
        times, schedule = second.view(shape), process.schedule
        first = draw.level.t
        assert isinstance(first, Tensor)
        noisier, cleaner = torch.maximum(first, times), torch.minimum(first, times)
        is_pair = choice.view(shape) < self.share
        level = schedule.level(noisier)
        end = schedule.level(torch.where(is_pair, cleaner, noisier))
        return draw._replace(level=replace(level, end=end))

    def errors(self, sample: NoisySample) -> Tensor:
        random = RandomState(sample.x)
        mean = mean_velocity(sample.denoiser, sample.x, sample.level, sample)
        with random.repeated():
            goal = self.target(sample)
        square = (mean - goal).square()
        total = square.detach().flatten(1).sum(1).view(-1, *[1] * (square.ndim - 1))
        return math.prod(square.shape[1:]) * square / (total + self.floor) ** self.power

    def target(self, sample: NoisySample) -> Tensor:
        """v - (a_t - a_r) dU/da, of the shape of x.

        Args:
            sample: samples at their levels, with the second level as end.
        """
        velocity, level, end = self._velocity(sample), sample.level, sample.end
        slope = self.derivative(
            lambda x, moved: mean_velocity(sample.denoiser, x, moved, sample),
            sample.x,
            level,
            velocity,
        )  # by ln u: a (1-a) dU/da
        a = torch.as_tensor(level.blend)
        distance = (a - end.blend) / (a * (1 - a))
        return velocity - distance.to(slope) * slope

    def _velocity(self, sample: NoisySample) -> Tensor:
        """v of the flow at the level, guided for samples that keep their condition."""
        x0, eps = sample.pair()
        velocity = eps - x0
        if not self.is_guided:
            return velocity
        process, level = sample.denoiser.process, replace(sample.level, end=None)
        assert sample.given is not None
        nothing = without(process, sample.given, list(process.dropouts))
        with evaluation_mode(sample.denoiser):
            own, free = (
                mean_velocity(sample.denoiser, sample.x, level, replace(sample, condition=c))
                for c in (sample.given, nothing)
            )
        guided = self.omega * velocity + self.kappa * own + (1 - self.omega - self.kappa) * free
        masks = [sample.draw.dropout_mask, *sample.draw.condition_masks.values()]
        dropped = torch.stack(masks).any(0).view(-1, *[1] * (velocity.ndim - 1))
        return torch.where(dropped.to(velocity.device), velocity, guided)


def mean_velocity(denoiser: Denoiser, x: Tensor, level: Level, sample: NoisySample) -> Tensor:
    """U = ε - x_0 of the pair of a network of two times.

    Args:
        denoiser: network that estimates the mean velocity.
        x: noisy samples (B, *shape).
        level: their level, with its end; without one, U is the velocity.
        sample: samples that have the condition.

    Returns:
        U, of the shape of x.
    """
    x0, eps = denoiser(x, level, sample.condition)
    return eps - x0
