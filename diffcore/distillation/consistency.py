"""Consistency models: networks that map each point of a flow to its clean end."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffcore.core.denoiser import Denoiser
from diffcore.core.estimate import Estimate
from diffcore.core.prediction import target
from diffcore.core.process import Process
from diffcore.distillation.derivative import Derivative
from diffcore.distillation.few_step import (
    FewStepObjective,
    NoisySample,
    RandomState,
    Target,
    check_target,
)
from diffcore.distillation.intervals import Intervals, KnotIntervals
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.losses import Loss, RootMeanSquareHuber
from diffcore.schedules import Level

__all__ = ["Consistency", "ContinuousConsistency"]


@dataclass(frozen=True)
class Consistency(FewStepObjective):
    """Consistency of neighbouring levels t and s of one flow, discretised by `intervals`.

        L = w ρ(f(x_t, t) - sg f(x_s, s)),   f = x_0 of the network,   f(x, 0) = x

    x_s is α_s x_0 + σ_s ε of the same x_0 and ε (consistency training), or the end of a step of the
    teacher's flow from x_t (consistency distillation). sg is the network without gradient, with
    the same dropout. By default it is improved consistency training (Song & Dhariwal 2023,
    2310.14189); ShrinkingIntervals give easy consistency tuning (Geng et al. 2024, 2406.14548),
    which starts from the weights of a denoiser; a teacher gives consistency distillation (Song et
    al. 2023, 2303.01469), and with guidance, KnotIntervals of 50 steps and order 1 that of latent
    consistency models (Luo et al. 2023, 2310.04378).

    With a teacher, the exact consistency function has no loss up to the error of the teacher's
    step. From data, its gradient has mean zero in the limit of short intervals.

    Args:
        intervals: rule of the two levels and of the weight.
        loss: function ρ of the error of x_0.
        order: order of the teacher's step: 1, DDIM's step, or 2, Heun's in a = σ/(α+σ), which
            evaluates the teacher twice and ends at the clean level with a step of order 1.
        target: weights of sg f: own, as in improved consistency training, which argues against an
            average (section 3.2), or average (those of `Trainer.ema`), as in consistency
            distillation and latent consistency models.

    Raises:
        ValueError: a field is out of range, or one that this objective does not read is given.

    Example:
        >>> Consistency(intervals=KnotIntervals(first=4, last=64, period=10)).intervals.count(20)
        16
    """

    loss: Loss = field(default_factory=RootMeanSquareHuber)
    intervals: Intervals = field(default_factory=KnotIntervals)
    order: Literal[1, 2] = 2
    target: Target = "own"

    ESTIMATE: ClassVar[Estimate] = "consistency"
    UNREAD: ClassVar = tuple(name for name in FewStepObjective.UNREAD if name != "loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}, expected 1 or 2")
        check_target(self.target)

    @property
    def needs_average(self) -> bool:
        return self.target == "average"

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        super().check(process, inputs)
        self.intervals.check(process)

    def draw(
        self,
        process: Process,
        key: SampleKey,
        device: torch.device | None = None,
        state: ResamplerState | None = None,
    ) -> Draw:
        draw = super().draw(process, key, device, state)
        schedule = process.schedule
        times = schedule.training_times(self.times(key)).view(-1, *[1] * len(process.shape))
        level, end = self.intervals.levels(schedule, times, key.step)
        return draw._replace(level=replace(level, end=end))

    def errors(self, sample: NoisySample) -> Tensor:
        random, level, end = RandomState(sample.x), sample.level, sample.end
        denoiser = sample.target(self.target)
        student = sample.denoiser(sample.x, level, sample.condition).x0
        # At the clean level f(x, 0) = x, also where the network cannot be evaluated.
        is_clean = torch.as_tensor(end.sigma) == 0
        inner = level.schedule.at(torch.where(is_clean, level.logsnr, end.logsnr))
        with random.repeated(), _in_mode_of(sample.denoiser, denoiser):
            x = self._neighbour(sample, end)
            known = denoiser(
                torch.where(is_clean.to(x.device), sample.x, x), inner, sample.condition
            )
        is_clean = is_clean.to(x.device)
        clean = x / torch.as_tensor(end.alpha).to(x)
        goal = torch.where(is_clean, clean, known.x0)
        sigma_data = sample.denoiser.process.sigma_data
        weight = self.intervals.weight(level, end, sigma_data).to(student)
        return weight * self.loss(student - goal)

    def _neighbour(self, sample: NoisySample, end: Level) -> Tensor:
        """x_s at the other end of the interval: of the data, or of the teacher's flow."""
        if sample.teacher is None:
            return sample.at(end)
        return follow(sample, end, self.order)


@contextmanager
def _in_mode_of(student: Denoiser, averaged: Denoiser) -> Iterator[None]:
    """Context in which averaged weights have the dropout of the student; their buffers stay."""
    if averaged is student or not student.training:
        yield
        return
    buffers = [(value, value.clone()) for value in averaged.buffers()]
    averaged.train()
    try:
        yield
    finally:
        averaged.eval()
        for value, before in buffers:
            value.copy_(before)


@torch.no_grad()
def follow(sample: NoisySample, end: Level, order: int) -> Tensor:
    """One step of the teacher's flow from the level of a sample.

    Args:
        sample: samples with a teacher.
        end: level at which the step ends.
        order: 1, or 2 for Heun's step in a = σ/(α+σ), of order 1 where it ends clean.

    Returns:
        x at `end`, of the shape of x.
    """
    assert sample.teacher is not None
    pair = sample.pair()
    x = pair.at(end)
    if order == 1:
        return x
    is_clean = torch.as_tensor(end.sigma) == 0
    level = sample.level
    inner = end.schedule.at(torch.where(is_clean, level.logsnr, end.logsnr))
    is_clean = is_clean.to(x.device)
    second = sample.teacher(torch.where(is_clean, sample.x, x), inner, sample.condition)
    # z_s = z + (a_s - a)(v_t + v_s)/2, as the difference from the first-order step.
    values = end.to(x)
    change = (values.blend - level.to(x).blend) / 2
    slope = (second.eps - second.x0) - (pair.eps - pair.x0)
    return x + torch.where(is_clean, 0.0, (values.alpha + values.sigma) * change * slope)


@dataclass(frozen=True)
class ContinuousConsistency(FewStepObjective):
    """Consistency in the limit of short intervals (sCM), by the tangent of the network.

        x' = cos θ x_0 + sin θ s ε,   tan θ = σ/(α s),   f = cos θ x' - sin θ s F
        g = -cos²θ (s F⁻ - dx'/dθ) - r sin θ cos θ (x' + s dF⁻/dθ),   r = min(1, step/warmup)
        L = |F - F⁻ - g/(|g| + c)|² / D,   F⁻ = sg F

    F is the output in the form of TrigFlow, whatever the network predicts; s is `sigma_data` and D
    the number of elements. dx'/dθ = cos θ s ε - sin θ x_0 is that of the data, or of the teacher's
    pair. g without warm-up is cos θ df/dθ. `uncertainty` is the adaptive weight of the source. The
    source draws λ from Normal.edm(mean=-1, std=1.4), and evaluates networks whose embeddings of the
    time are smooth: for time conditioning by index or t use a scale well below 1000.

    Source: Lu & Song 2024 (2410.11081, Algorithm 1).

    Args:
        derivative: how dF/dθ is computed.
        warmup: number of steps over which the second term of g grows; 0 for none.
        normalisation: c > 0 of g/(|g| + c); inf leaves g as it is.

    Raises:
        ValueError: a field is out of range, or one that this objective does not read is given.
    """

    derivative: Derivative = field(default_factory=Derivative)
    warmup: int = 10_000
    normalisation: float = 0.1

    ESTIMATE: ClassVar[Estimate] = "consistency"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected a number of steps, or 0 for none")
        if not self.normalisation > 0:
            raise ValueError(
                f"normalisation is {self.normalisation}, expected a positive c, or inf for none"
            )

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        super().check(process, inputs)
        check_continuous(process, self)

    def errors(self, sample: NoisySample) -> Tensor:
        random = RandomState(sample.x)
        output = _trigonometric(sample, sample.x, sample.level)
        with random.repeated():
            tangent = self.tangent(sample, output.detach())
        if self.normalisation < math.inf:
            norm = tangent.flatten(1).norm(dim=1).view(-1, *[1] * (tangent.ndim - 1))
            tangent = tangent / (norm + self.normalisation)
        return (output - output.detach() - tangent).square()

    def tangent(self, sample: NoisySample, output: Tensor) -> Tensor:
        """g, of the shape of x.

        Args:
            sample: samples at their levels.
            output: F⁻ of the samples.
        """
        s, level = sample.denoiser.process.sigma_data, sample.level.to(sample.x)
        norm = (level.alpha**2 * s**2 + level.sigma**2) ** 0.5
        cos, sin = level.alpha * s / norm, level.sigma / norm
        x0, eps = sample.pair()
        derivative = self.derivative(
            lambda x, moved: _trigonometric(sample, x, moved), sample.x, sample.level, eps - x0
        )  # by ln u, which is sin θ cos θ d/dθ
        assert sample.draw.key is not None
        share = min(1.0, sample.draw.key.step / self.warmup) if self.warmup else 1.0
        first = -(cos**2) * (s * output - (cos * s * eps - sin * x0))
        return first - share * (cos * sin * (s / norm) * sample.x + s * derivative)


def _trigonometric(sample: NoisySample, x: Tensor, level: Level) -> Tensor:
    """F of TrigFlow, (cos θ s ε - sin θ x_0)/s, from the pair of the network."""
    process = sample.denoiser.process
    x0, eps = sample.denoiser(x, level, sample.condition)
    return -target("edm", x0, eps, level.to(x), process.sigma_data)


def check_continuous(process: Process, objective: FewStepObjective) -> None:
    """Raise ValueError if an objective differentiates by levels, and those are of a table.

    Args:
        process: process of the network.
        objective: the objective, for the message.
    """
    if process.schedule.steps is not None:
        raise ValueError(
            f"{type(objective).__name__} differentiates the network by the level, and "
            f"{process.schedule} draws the levels of a table: use {process.schedule} in Truncated, "
            "which draws continuous t"
        )
