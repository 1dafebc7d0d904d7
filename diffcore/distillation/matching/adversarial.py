"""Students that are trained against a discriminator: the base class, and YOSO and Diffusion-GAN.

    student        softplus(-D(x̃))
    discriminator  softplus(-D(x)) + softplus(D(x̃)) + γ/2 |∇_x D(x)|²

x and x̃ are samples of two distributions that become equal at each level.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import LabelWrapper, unwrap
from diffcore.core.process import Process
from diffcore.distillation.matching.discriminator import (
    DISCRIMINATOR,
    Discriminator,
    generator_losses,
)
from diffcore.distillation.matching.student import (
    StudentObjective,
    denoising_process,
    drop_conditions,
    rollout_noise,
)
from diffcore.distillation.teacher import Teacher
from diffcore.objectives.draw import Draw
from diffcore.objectives.networks import Networks, RunningStatistics
from diffcore.samplers.base import is_clean
from diffcore.schedules import Level, Schedule

__all__ = [
    "AdaptiveDiscriminator",
    "AdversarialObjective",
    "Comparison",
    "DiffusionGAN",
    "SelfCooperative",
]


class Comparison(NamedTuple):
    """What a discriminator compares.

    Args:
        real: samples (B, ...) of the distribution that the student should have.
        fake: samples of the student, of the same shape, with their gradient.
        level: level on which the discriminator is conditioned.
        further: further loss (B,) of the student; None for none.
    """

    real: Tensor
    fake: Tensor
    level: Level
    further: Tensor | None = None


@dataclass(frozen=True)
class AdversarialObjective(StudentObjective):
    """An objective of a student against a discriminator; a base class.

    Args:
        discriminator: estimates ln p/q of what is compared.
        teacher: network whose features the discriminator may read; None for none.
    """

    _: KW_ONLY
    discriminator: Discriminator
    teacher: Teacher | None = None

    @abstractmethod
    def compare(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Comparison:
        """Both sides of the discriminator's comparison.

        Args:
            denoiser: network of the student.
            x0: data (B, *shape).
            condition: conditions of the samples.
            draw: random numbers of the samples.
            networks: networks of the objective.

        Returns:
            The samples that are compared.
        """

    @property
    def content_hash(self) -> str:
        return "" if self.teacher is None else self.teacher.content_hash

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the process does not fit the student or the teacher.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        super().check(process, inputs)
        if self.teacher is not None:
            self.teacher.check(process)

    def networks(
        self, denoiser: Denoiser, device: torch.device, label_wrapper: LabelWrapper
    ) -> Networks:
        process, teacher, backbones = denoising_process(denoiser.process), None, {}
        if self.teacher is not None:
            teacher = self.teacher.denoiser(device, denoiser.process, label_wrapper)
            backbones["teacher"] = teacher
        module = self._wrap(self.discriminator.module(backbones, process), process.schedule)
        trained = self.discriminator.training.network(module, self.discriminator.r1 > 0)
        return Networks(teacher, {DISCRIMINATOR: trained})

    def _wrap(self, module: nn.Module, schedule: Schedule) -> nn.Module:
        """The discriminator's module with the statistics of the objective, if it has some."""
        return module

    def network_losses(
        self,
        name: str,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        condition = drop_conditions(denoiser.process, condition, draw)
        process = denoising_process(denoiser.process)
        with torch.no_grad():
            pair = self.compare(denoiser, x0, condition, draw, networks)
        x, observe = (pair.real, pair.fake), partial(self._observe, networks)
        return self.discriminator.losses(networks, process, x, pair.level, condition, observe)

    def _observe(self, networks: Networks, logits: Tensor) -> None:
        """Record statistics of the logits (B,) of the data that it is trained on, if there are."""

    def student_losses(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        process = denoising_process(denoiser.process)
        pair = self.compare(denoiser, x0, condition, draw, networks)
        logits = self.discriminator.logits(networks, process, pair.fake, pair.level, condition)
        losses = generator_losses(logits)
        return losses if pair.further is None else losses + pair.further


@dataclass(frozen=True)
class SelfCooperative(AdversarialObjective):
    """YOSO: samples from a noisier level imitate the student's own samples from a cleaner level.

        x̃ = G(x_t, t),   x = sg G(x_s, s),   t and s neighbouring knots, x_t and x_s of the data

    with the same x_0 and ε in x_t and x_s. At the clean knot G is the identity: the last step
    imitates the data, and each other step the one after it. The discriminator sees both without
    noise and is conditioned on t, since each step is compared on its own: summed over the steps,
    the samples of all but the noisiest one would be on both sides and cancel. The consistency loss
    c mean |x̃ - x|² is added. The source also has a term of denoising, which is not part of this
    objective, and draws t from all levels.

    Source: Luo et al. 2024 (YOSO, 2403.12931).

    Args:
        consistency: c.

    Raises:
        ValueError: `consistency` is negative.
    """

    consistency: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.consistency >= 0:
            raise ValueError(f"consistency is {self.consistency}, expected at least 0")

    def compare(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Comparison:
        knots, index = self.student.knots(denoiser.process.schedule), self.student.step_index(draw)
        noise, x0 = rollout_noise(draw, 0), x0.to(draw.noise)
        t, s = knots[index : index + 2]
        fake = denoiser(t.alpha * x0 + t.sigma * noise, t, condition).x0
        real = x0
        if not is_clean(s):
            with torch.no_grad():
                real = denoiser(s.alpha * x0 + s.sigma * noise, s, condition).x0
        further = self.consistency * (fake - real).square().flatten(1).mean(1)
        return Comparison(real, fake, t, further)


class AdaptiveDiscriminator(RunningStatistics):
    """A discriminator whose samples are diffused up to a level that adapts.

        reach ← reach + speed · sign(r - target),   r = mean sign D(x) over data

    Args:
        module: the discriminator's module.
        schedule: schedule of the levels, of which 1000 are tabulated.
        target: value of r at which the reach stays.
        speed: change of the reach in a step.
    """

    reach: Tensor
    table: Tensor
    LEVELS = 1000

    def __init__(self, module: nn.Module, schedule: Schedule, target: float, speed: float) -> None:
        super().__init__()
        self.module, self.schedule, self.target, self.speed = module, schedule, target, speed
        times = (torch.arange(self.LEVELS, dtype=torch.float64) + 1) / self.LEVELS
        level = schedule.level(times)
        assert isinstance(level.alpha, Tensor)
        assert isinstance(level.sigma, Tensor)
        table = torch.stack((times, level.alpha, level.sigma))
        self.register_buffer("table", table.float(), persistent=False)
        self.register_buffer("reach", torch.tensor(speed))

    def forward(self, *arguments: Tensor, **named: Tensor) -> Tensor:
        """The output of the module."""
        output: Tensor = self.module(*arguments, **named)
        return output

    def level(self, u: Tensor, x: Tensor) -> Level:
        """The levels at the times u · reach, on the device, without reading the reach.

        Args:
            u: (B,) numbers within [0, 1].
            x: samples (B, *shape) on the device.

        Returns:
            Levels (B, 1, ...).
        """
        times = u.to(x.device) * self.reach * self.LEVELS
        index = times.long().clamp(0, self.LEVELS - 1)
        shape = (-1, *[1] * (x.ndim - 1))
        t, alpha, sigma = (row[index].view(shape) for row in self.table)
        # λ = -inf at pure noise is no value of a buffer, of which each is to be finite.
        return Level(2 * (alpha.log() - sigma.log()), t, alpha, sigma, self.schedule)

    def update(self, sums: Tensor) -> None:
        """Move the reach after a step.

        Args:
            sums: sum of sign D(x) over the data of the step, and the number of the data.
        """
        change = self.speed * (sums[0] / sums[1] - self.target).sign()
        self.reach.add_(change.to(self.reach)).clamp_(self.speed, 1.0)


@dataclass(frozen=True)
class DiffusionGAN(AdversarialObjective):
    """Diffusion-GAN: data and samples are diffused to random levels t ≤ reach, which adapts.

        x = α x_0 + σ ε,   x̃ = α G(z) + σ ε',   t ~ U(0, reach)

    The reach grows while the discriminator is too good: r = mean sign D(x) above the target.

    The source has one step. The discriminator of a student of several steps sees the samples of all
    steps as one distribution, which may be that of the data where a single step's is not.

    Source: Wang et al. 2022 (2206.02262), d_target = 0.6.

    Args:
        target: r at which the reach stays, within (-1, 1).
        speed: change of the reach in a step, as a share of the time of the schedule.

    Raises:
        ValueError: a number is out of range.
    """

    target: float = 0.6
    speed: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.target < 1:
            raise ValueError(f"target is {self.target}, expected within (-1, 1)")
        if not 0 < self.speed <= 1:
            raise ValueError(f"speed is {self.speed}, expected within (0, 1]")

    def _wrap(self, module: nn.Module, schedule: Schedule) -> nn.Module:
        return AdaptiveDiscriminator(module, schedule, self.target, self.speed)

    def compare(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Comparison:
        sample = self.student.sample(denoiser, condition, draw)
        adaptive, t = _adaptive(networks), draw.level.t
        assert isinstance(t, Tensor)
        level = adaptive.level(t.flatten(1)[:, 0], sample)
        real = level.alpha * x0.to(sample) + level.sigma * draw.noise
        fake = level.alpha * sample + level.sigma * rollout_noise(draw, self.student.steps)
        return Comparison(real, fake, level)

    def _observe(self, networks: Networks, logits: Tensor) -> None:
        signs = logits.sign()
        _adaptive(networks).record(torch.stack((signs.sum(), torch.ones_like(signs).sum())))


def _adaptive(networks: Networks) -> AdaptiveDiscriminator:
    """The discriminator's module without what accelerate wrapped around it."""
    module = unwrap(networks.module(DISCRIMINATOR))
    assert isinstance(module, AdaptiveDiscriminator)
    return module
