"""Few-step students that map noise to samples: their knots, and how training simulates them.

    x_0 = G(x_T, λ_0),   x_T = √(α² s² + σ²) z_0 at the first knot
    x_i = α_i G(x_{i-1}, λ_{i-1}) + σ_i z_i

It is the multistep sampler `Consistency` on the knots of a grid.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffcore.core.conditions import LABEL, BatchCondition, drop
from diffcore.core.denoiser import Denoiser
from diffcore.core.prediction import edm_norm
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal, uniform
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.samplers.base import is_clean
from diffcore.schedules import Grid, Level, Schedule, Trailing

__all__ = [
    "Student",
    "StudentObjective",
    "denoising_process",
    "drop_conditions",
    "key_of",
    "noised",
    "refuse_sample_weight",
    "rollout_noise",
]

MAXIMUM_STEPS = 64
UNUSED = ("coupling", "resampler", "perturbation", "offset", "uncertainty", "variational")
"""Fields of `Objective` that change x of the data, which the teacher does not see, or the loss."""


@dataclass(frozen=True)
class Student:
    """The steps in which a student turns noise into samples: it is sampled with the same ones.

    Args:
        steps: number of evaluations of the network, 1 to 64; few-step students have 1 to 4.
        grid: knots, of which the first is noise and the last is clean.

    Raises:
        ValueError: `steps` is out of range.
    """

    steps: int = 1
    grid: Grid = field(default_factory=Trailing)

    def __post_init__(self) -> None:
        if self.steps not in range(1, MAXIMUM_STEPS + 1):
            raise ValueError(
                f"student.steps is {self.steps}, expected 1 to {MAXIMUM_STEPS} evaluations"
            )

    def knots(self, schedule: Schedule) -> tuple[Level, ...]:
        """The knots of the student.

        Args:
            schedule: schedule of its process.

        Returns:
            steps + 1 levels, from noise to clean.
        """
        return _knots(self.grid, schedule, self.steps)

    def check(self, process: Process) -> None:
        """Raise ValueError if a process is not that of a student with these steps.

        Args:
            process: process of the network.
        """
        if process.estimate != "consistency":
            raise ValueError(
                f"process.estimate is {process.estimate}, but the x_0 of a student is a sample: "
                "set process.estimate: consistency, which the sampler Consistency reads"
            )
        knots = self.knots(process.schedule)
        process.check_level(knots[0], "the first knot of the student")
        if not is_clean(knots[-1]):
            raise ValueError(
                f"student.grid is {self.grid}, whose last knot is at λ = {knots[-1].logsnr:g}: "
                "choose a grid with a clean end, such as Trailing"
            )

    def start(self, process: Process, draw: Draw) -> Tensor:
        """The first x of samples, a function of their key.

        Args:
            process: process of the network.
            draw: random numbers of the samples.

        Returns:
            x (B, *shape) at the first knot, on the device of the draw.
        """
        scale = edm_norm(self.knots(process.schedule)[0], process.sigma_data)
        return scale * rollout_noise(draw, 0)

    def step_index(self, draw: Draw) -> int:
        """The step that is trained in an optimizer step, the same for all its samples.

        Args:
            draw: random numbers of the samples.

        Returns:
            An index below `steps`, uniform over the optimizer steps.
        """
        key = key_of(draw)
        u = float(uniform(key.seed, Stream.ROLLOUT_STEP, key.step)[0])
        return min(int(u * self.steps), self.steps - 1)

    def sample(self, denoiser: Denoiser, condition: BatchCondition | None, draw: Draw) -> Tensor:
        """x_0 of the step that is trained; the steps before it are simulated without gradient.

        Args:
            denoiser: network of the student.
            condition: conditions of the samples.
            draw: random numbers of the samples.

        Returns:
            x_0 (B, *shape), whose gradient is that of the last evaluation.

        Source: Yin et al. 2024 (DMD2, 2405.14867, section 4.5).
        """
        knots, last = self.knots(denoiser.process.schedule), self.step_index(draw)
        x = self.start(denoiser.process, draw)
        with torch.no_grad():
            for index in range(last):
                x0 = denoiser(x, knots[index], condition).x0
                s = knots[index + 1]
                x = s.alpha * x0 + s.sigma * rollout_noise(draw, index + 1)
        return denoiser(x, knots[last], condition).x0


@lru_cache(maxsize=64)
def _knots(grid: Grid, schedule: Schedule, steps: int) -> tuple[Level, ...]:
    return grid.knots(schedule, steps)


def rollout_noise(draw: Draw, index: int) -> Tensor:
    """Standard normal noise (B, *shape) of a step of the student, on the device of the draw.

    Args:
        draw: random numbers of the samples.
        index: 0 for the first x, i for the noise that is added before evaluation i.

    Returns:
        The noise, which is independent of that in the draw.
    """
    key, noise = key_of(draw), draw.noise
    position = key.position * MAXIMUM_STEPS + index
    return normal(key.seed, Stream.ROLLOUT, position, noise.shape[1:], noise.device)


def key_of(draw: Draw) -> SampleKey:
    """The key of the samples of a draw.

    Args:
        draw: result of `Objective.draw`.

    Returns:
        The key.
    """
    assert draw.key is not None
    return draw.key


def drop_conditions(
    process: Process, condition: BatchCondition | None, draw: Draw
) -> BatchCondition | None:
    """The conditions of samples, without those that a draw drops.

    Args:
        process: process of the network.
        condition: conditions of the samples.
        draw: random numbers of the samples.

    Returns:
        The conditions under which student, teacher and further networks are evaluated.
    """
    if condition is None:
        return None
    return drop(process, condition, {LABEL: draw.dropout_mask, **draw.condition_masks})


def denoising_process(process: Process) -> Process:
    """The process of a denoiser of the student's samples: the student's, with posterior means.

    Args:
        process: process of the student.

    Returns:
        The process of a fake network and of a discriminator.
    """
    return replace(process, estimate="posterior_mean")


def refuse_sample_weight(sample_weight: Tensor | None) -> None:
    """Raise ValueError if the data has weights or masks, which samples of a student have not.

    Args:
        sample_weight: weights of a batch; None for none.
    """
    if sample_weight is not None:
        raise ValueError(
            "the data has loss masks or weights, which samples of a student do not have: leave the "
            "masks out"
        )


def noised(x0: Tensor, draw: Draw) -> Tensor:
    """x = α x_0 + σ ε at the level of a draw, of the shape of x_0.

    Args:
        x0: samples (B, *shape).
        draw: their level and noise.

    Returns:
        The noisy samples.
    """
    level = draw.level.to(x0)
    return level.alpha * x0 + level.sigma * draw.noise


@dataclass(frozen=True)
class StudentObjective(Objective):
    """An objective of a student that maps noise to samples; a base class.

    The inherited fields are those of the levels at which samples are compared.

    Args:
        student: steps of the student.

    Raises:
        ValueError: an inherited field has no meaning for samples of a student.
    """

    student: Student = field(default_factory=Student)

    is_surrogate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = Objective()
        for name in UNUSED:
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which {type(self).__name__} does not use: "
                    "leave it out"
                )

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the process is not that of a student, or a level does not fit.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        self.student.check(process)
        super().check(replace(process, estimate="posterior_mean"), inputs)

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        log_variance: nn.Module | None = None,
        sample_weight: Tensor | None = None,
        networks: Networks | None = None,
    ) -> Tensor:
        """The loss of each sample of the student, of shape (B,); see `student_losses`.

        Args:
            denoiser: network of the student with its process.
            x0: data (B, *shape).
            condition: class labels (B,), or `Conditions`, of the samples.
            draw: random numbers of the samples, from `draw`.
            log_variance: None, since the objective has no uncertainty.
            sample_weight: None: samples of the student have no masks.
            networks: networks of the objective.
        """
        assert networks is not None
        refuse_sample_weight(sample_weight)
        condition = drop_conditions(denoiser.process, condition, draw)
        return self.student_losses(denoiser, x0, condition, draw, networks)

    @abstractmethod
    def student_losses(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: BatchCondition | None,
        draw: Draw,
        networks: Networks,
    ) -> Tensor:
        """The loss of each sample of the student, of shape (B,); see the class.

        Args:
            denoiser: network of the student with its process.
            x0: data (B, *shape).
            condition: conditions of the samples, without those that the draw drops.
            draw: random numbers of the samples.
            networks: networks of the objective.
        """
