"""What the objectives of few-step networks share: samples at a level, and targets of the network.

The target of a few-step network is an evaluation of the network itself, or of its averaged weights,
without gradient and with the same random numbers: dropout that differs between both would be an
error of the target.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from diffcore.core.condition_values import GUIDANCE_SCALE, check_guidance_range, process_without
from diffcore.core.conditions import BatchCondition
from diffcore.core.denoiser import Denoiser, DenoiserProtocol
from diffcore.core.estimate import Estimate
from diffcore.core.network import LabelWrapper
from diffcore.core.prediction import Prediction, at_least_float32
from diffcore.core.process import Process
from diffcore.core.random import Stream, uniform
from diffcore.distillation.guided_denoiser import ScaledDenoiser
from diffcore.distillation.teacher import Teacher, check_teacher
from diffcore.guidance import CFG
from diffcore.objectives.draw import Draw, SampleKey
from diffcore.objectives.level_sampling import ResamplerState
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.schedules import Level

__all__ = ["FewStepObjective", "NoisySample", "RandomState", "Target", "check_target"]

Target = Literal["average", "own"]
"""The weights that a target is evaluated with: averaged ones (EMA), or those that are trained."""


@dataclass(frozen=True, eq=False)
class NoisySample:
    """Samples at their noise levels, and the networks that are evaluated there.

    Args:
        denoiser: network that is trained, with its process.
        teacher: frozen denoiser; None to train from the data.
        x0: clean samples (B, *shape).
        noise: ε of the samples, of the shape of x_0.
        draw: random numbers of the samples, with their levels.
        condition: condition of the samples, some of which are dropped; None for none.
        given: condition before any is dropped.
        averaged: network with its averaged weights, see `Networks`; None if there is none.
    """

    denoiser: Denoiser
    teacher: DenoiserProtocol | None
    x0: Tensor
    noise: Tensor
    draw: Draw
    condition: BatchCondition | None
    given: BatchCondition | None = None
    averaged: Denoiser | None = None

    def target(self, weights: Target) -> Denoiser:
        """The denoiser with the weights of a target, to be evaluated without gradient."""
        if weights == "own":
            return self.denoiser
        assert self.averaged is not None
        return self.averaged

    @property
    def level(self) -> Level:
        """Noise level of each sample on the host; its `end` is the level of the target."""
        return self.draw.level

    @property
    def end(self) -> Level:
        """The level that the objective compares with, on the host."""
        assert self.level.end is not None
        return self.level.end

    @cached_property
    def x(self) -> Tensor:
        """α x_0 + σ ε at the level."""
        return self.at(self.level)

    def at(self, level: Level) -> Tensor:
        """α x_0 + σ ε at another level, of the shape of x_0."""
        return Prediction(self.x0, self.noise).at(level)

    @torch.no_grad()
    def pair(self) -> Prediction:
        """The pair (x_0, ε) at the level: that of the teacher, or of the data.

        Returns:
            The pair, whose ε - x_0 is the velocity of the flow, or has it as its mean.
        """
        if self.teacher is None:
            return Prediction(self.x0, self.noise)
        return self.teacher(self.x, self.level, self.condition)


class RandomState:
    """The state of torch's generators before an evaluation, to repeat it with the same dropout.

    Args:
        x: tensor on the device of the evaluation.
    """

    def __init__(self, x: Tensor) -> None:
        self.devices = [x.device] if x.device.type == "cuda" else []
        self.host = torch.get_rng_state()
        self.device = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Context without gradients in which the generators start from the state.

        Yields:
            None; the generators continue afterwards as if nothing had been drawn.
        """
        with torch.no_grad(), torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.host)
            for device, state in zip(self.devices, self.device, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@dataclass(frozen=True)
class FewStepObjective(Objective):
    """Base of the objectives of few-step networks.

    Args:
        teacher: frozen denoiser whose flow is distilled; None to train from the data alone.
        guidance_range: interval of the scale w of the teacher's classifier-free guidance, which is
            drawn uniformly for each sample (Luo et al. 2023, 2310.04378, Algorithm 1) and is the
            condition `guidance_scale` of the student; None for the teacher's own guidance.
    """

    teacher: Teacher | None = None
    guidance_range: tuple[float, float] | None = None

    ESTIMATE: ClassVar[Estimate]
    """What the pair of the trained network is."""
    UNREAD: ClassVar[tuple[str, ...]] = (
        "weight",
        "corrected",
        "resampler",
        "loss",
        "perturbation",
        "offset",
        "reference_size",
        "variational",
    )
    """Options of Objective that this one does not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: _default(f.default, f.default_factory) for f in fields(Objective)}
        for name in self.UNREAD:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name} is {value}, which {type(self).__name__} does not read: it has a "
                    f"weight and levels of its own; leave {name} out"
                )
        if self.teacher is not None:
            check_teacher(self.teacher)
        if self.guidance_range is not None:
            object.__setattr__(self, "guidance_range", tuple(self.guidance_range))
            check_guidance_range(*self.guidance_range)
            self._check_guidance_of_teacher()

    def _check_guidance_of_teacher(self) -> None:
        if self.teacher is None or self.teacher.guidance != CFG(1.0):
            guidance = None if self.teacher is None else self.teacher.guidance
            raise ValueError(
                f"guidance_range is {self.guidance_range}, and the guidance of the teacher is "
                f"{guidance}: set a teacher without guidance of its own, or leave guidance_range "
                "out"
            )

    def check(self, process: Process, inputs: Iterable[str] = ()) -> None:
        """Raise ValueError if the process, the teacher and the objective do not fit together.

        Args:
            process: process of the network.
            inputs: names of further inputs of the network (`DataSource.inputs`).
        """
        if process.estimate != self.ESTIMATE:
            raise ValueError(
                f"process.estimate is {process.estimate}, and {type(self).__name__} trains a "
                f"network that gives the {self.ESTIMATE}: set process.estimate to {self.ESTIMATE}"
            )
        super().check(replace(process, estimate="posterior_mean"), inputs)
        if self.guidance_range is not None:
            self._check_guidance_condition(process, *self.guidance_range)
        if self.teacher is not None:
            drawn = None if self.guidance_range is None else CFG(self.guidance_range[1])
            self.teacher.check(self._teacher_process(process), drawn)

    def _check_guidance_condition(self, process: Process, low: float, high: float) -> None:
        record = process.conditions.get(GUIDANCE_SCALE)
        if record is None or record.shape != (1,) or record.low > low or record.high < high:
            raise ValueError(
                f"guidance_range is [{low:g}, {high:g}], and the process has no condition "
                f"{GUIDANCE_SCALE} of shape [1] whose range contains guidance_range: give it one "
                "in process.conditions (absent: null, null: [default w])"
            )

    def _teacher_process(self, process: Process) -> Process:
        """The process of the student without the scale of guidance, if that is drawn."""
        is_fixed = self.guidance_range is None
        return process if is_fixed else process_without(process, GUIDANCE_SCALE)

    @property
    def content_hash(self) -> str:
        return "" if self.teacher is None else self.teacher.content_hash

    def networks(
        self, denoiser: Denoiser, device: torch.device, label_wrapper: LabelWrapper
    ) -> Networks:
        if self.teacher is None:
            return Networks()
        process = self._teacher_process(denoiser.process)
        teacher = self.teacher.denoiser(device, process, label_wrapper)
        return Networks(teacher if self.guidance_range is None else ScaledDenoiser(teacher))

    def draw(
        self,
        process: Process,
        key: SampleKey,
        device: torch.device | None = None,
        state: ResamplerState | None = None,
    ) -> Draw:
        draw = super().draw(process, key, device, state)
        if self.guidance_range is None:
            return draw
        low, high = self.guidance_range
        scale = low + (high - low) * uniform(key.seed, Stream.GUIDANCE_SCALE, key.position)
        return draw._replace(conditions={**draw.conditions, GUIDANCE_SCALE: scale.float()})

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
        """The loss of each sample, of shape (B,); see `Objective`."""
        x0 = at_least_float32(x0)
        noise, dropped = self.inputs(denoiser.process, x0, condition, draw)
        networks = networks or Networks()
        teacher, averaged, name = networks.teacher, networks.averaged, type(self).__name__
        if self.teacher is not None and teacher is None:
            raise ValueError(f"{name} has a teacher: pass networks that contain it")
        if self.needs_average and averaged is None:
            raise ValueError(
                f"the target of {name} is the average of the weights: pass networks that contain "
                "it, as Trainer does, or set target to own"
            )
        sample = NoisySample(denoiser, teacher, x0, noise, draw, dropped, condition, averaged)
        return self.reduce(self.errors(sample), draw, log_variance, sample_weight)

    @abstractmethod
    def errors(self, sample: NoisySample) -> Tensor:
        """The weighted loss of each element, of the shape of x_0; its mean is that of a sample.

        Args:
            sample: samples at their levels.
        """


def check_target(target: str) -> None:
    """Raise ValueError if a target is neither of the two weights.

    Args:
        target: field of an objective.
    """
    if target not in get_args(Target):
        raise ValueError(f"target is {target!r}, expected one of {', '.join(get_args(Target))}")


def _default(value: Any, factory: Any) -> Any:
    """The default of a dataclass field."""
    return value if factory is MISSING else factory()
