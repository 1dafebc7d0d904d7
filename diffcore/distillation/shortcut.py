"""Shortcut models: networks of two times whose long steps agree with two short ones."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffcore.core.estimate import Estimate
from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.distillation.few_step import (
    FewStepObjective,
    NoisySample,
    RandomState,
    Target,
    check_target,
)
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import ResamplerState

__all__ = ["Shortcut"]


@dataclass(frozen=True)
class Shortcut(FewStepObjective):
    """Self-consistency over the length d of a step in a = σ/(α+σ), U = ε - x_0 of the network:

        U(z, a -> a - d) = sg (U(z, a -> a - d/2) + U(z', a - d/2 -> a - d)) / 2

    with z' = z - (d/2) U(z, a -> a - d/2), d = 2^-k for k = 0 .. log2(steps) - 1 and a a multiple
    of d. sg U is that of the averaged weights of the run (`Trainer.ema`), without dropout. The
    halves of the shortest step, of length 1/steps, are the velocity U(z, a -> a): the long steps
    reproduce `steps` Euler steps at best. The other samples are trained on the velocity
    of the data or of the teacher, |U(z, a -> a) - (ε - x_0)|², at the levels of the schedule.

    The exact mean velocity has no loss with an exact teacher, up to the error of these Euler steps.

    Source: Frans et al. 2024 (2410.12557, Algorithm 1), with steps = 128 and a share of 1/4, and
    the authors' code, whose average has the decay 0.999 without warm-up.

    Args:
        steps: number of the shortest steps, a power of 2, at least 2.
        share: share of the samples that are trained on long steps, in (0, 1).
        target: weights of U in the halves: average, or own (those that are trained, with the same
            dropout as the long step), with which long steps follow changes of short ones at once.

    Raises:
        ValueError: a field is out of range, or one that this objective does not read is given.
    """

    steps: int = 128
    share: float = 0.25
    target: Target = "average"

    ESTIMATE: ClassVar[Estimate] = "mean_velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ValueError(f"steps is {self.steps}, expected a power of 2, at least 2")
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, expected a share of samples within (0, 1)")
        check_target(self.target)

    @property
    def needs_average(self) -> bool:
        return self.target == "average"

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        super().check(process, inputs)
        process.check_level(process.schedule.at_blend(1.0), "the start of Shortcut's longest step")

    def draw(
        self,
        process: Process,
        key: SampleKey,
        device: torch.device | None = None,
        state: ResamplerState | None = None,
    ) -> Draw:
        draw = super().draw(process, key, device, state)
        choice, length, place = (
            values.view(-1, *[1] * len(process.shape))
            for values in uniform(key.seed, Stream.END_LEVEL, key.position, 3).unbind(1)
        )
        count = 2 ** (length * (self.steps.bit_length() - 1)).floor()  # steps of length d in [0, 1]
        index = (place * count).floor()
        is_long, flow = choice < self.share, draw.level.blend
        a = torch.where(is_long, 1 - index / count, flow)
        end = torch.where(is_long, 1 - (index + 1) / count, flow)
        level = process.schedule.at_blend(a)
        return draw._replace(level=replace(level, end=process.schedule.at_blend(end)))

    def errors(self, sample: NoisySample) -> Tensor:
        random = RandomState(sample.x)
        x0, eps = sample.denoiser(sample.x, sample.level, sample.condition)
        with random.repeated():
            halves = self._halves(sample)
        velocity = sample.pair()
        is_long = torch.as_tensor(sample.level.blend > sample.end.blend).to(sample.x.device)
        goal = torch.where(is_long, halves, velocity.eps - velocity.x0)
        return (eps - x0 - goal).square()

    def _halves(self, sample: NoisySample) -> Tensor:
        """The mean of U of both halves of a step."""
        denoiser = sample.target(self.target)
        level, end, schedule = sample.level, sample.end, sample.level.schedule
        a, b = torch.as_tensor(level.blend), torch.as_tensor(end.blend)
        middle = schedule.at_blend((a + b) / 2)
        # The halves of the shortest step have no shorter step below them.
        is_shortest = a - b < 3 / self.steps
        ends = [
            schedule.at_blend(torch.where(is_shortest, start, stop))
            for start, stop in ((a, (a + b) / 2), ((a + b) / 2, b))
        ]
        first = denoiser(sample.x, replace(level, end=ends[0]), sample.condition)
        x = first.at(middle)
        second = denoiser(x, replace(middle, end=ends[1]), sample.condition)
        return ((first.eps - first.x0) + (second.eps - second.x0)) / 2
