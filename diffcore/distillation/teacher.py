"""Teachers: the frozen denoisers that a few-step student is distilled from.

A teacher is a component of the settings. It names the folder of a run or of a diffusers pipeline,
or holds an exact denoiser, and loads the denoiser when the training starts. Teachers that name the
same weights share one network in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from diffcore.core.denoiser import (
    Denoiser,
    DenoiserProtocol,
    LevelMatchedDenoiser,
)
from diffcore.core.network import LabelWrapper, without_labels
from diffcore.core.process import Process
from diffcore.distillation.guided_denoiser import GuidedDenoiser
from diffcore.guidance import CFG, Guidance, Step
from diffcore.io.plain_data import hash_data
from diffcore.io.safetensors import hash_tensors
from diffcore.io.specs import to_spec
from diffcore.run import AVERAGED, Run

if TYPE_CHECKING:
    from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = [
    "OracleTeacher",
    "PipelineTeacher",
    "RunTeacher",
    "Teacher",
    "check_same_process",
    "check_teacher",
]

NOISIEST = 1 - 1e-9
"""Time that one level in 10^9 of a continuous schedule exceeds."""

_shared: WeakValueDictionary[tuple[str, ...], nn.Module] = WeakValueDictionary()
"""Networks of teachers that are in use, by the hash of their weights: a folder may change."""


class Teacher(ABC):
    """A frozen denoiser that a student is distilled from.

    A subclass has the field `guidance`, and implements `process`, `content_hash` and `_load`.
    """

    guidance: Guidance

    @property
    @abstractmethod
    def process(self) -> Process:
        """The process of the teacher's network, without the prompts of a text condition."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """Hash of the teacher's weights and of its process, 64 hexadecimal digits or more."""

    @abstractmethod
    def _load(
        self, device: torch.device, process: Process, label_wrapper: LabelWrapper
    ) -> DenoiserProtocol:
        """The denoiser without guidance, of a process that `process_for` returned."""

    @property
    def needs_prompts(self) -> bool:
        """Whether the network is conditioned on text; its labels are then captions of the data."""
        return False

    def process_for(self, student: Process) -> Process:
        """The process of the teacher's network under the conditions of a student.

        Args:
            student: process of the student.

        Returns:
            By default `process`; a text condition becomes the classes of the student.
        """
        return self.process

    def check(self, student: Process, guidance: Guidance | None = None) -> None:
        """Check that a student can be distilled from the teacher.

        Args:
            student: process of the student.
            guidance: rule by which the objective guides the teacher; None: `self.guidance`.

        Raises:
            ValueError: the processes do not fit together (`check_same_process`), or the guidance
                needs what the teacher lacks. The message has the remedy.
        """
        process = self.process_for(student)
        check_same_process(student, process)
        _check_guidance(guidance or self.guidance, process)

    def denoiser(
        self,
        device: torch.device | str = "cpu",
        student: Process | None = None,
        label_wrapper: LabelWrapper = without_labels,
    ) -> DenoiserProtocol:
        """Load the denoiser: in evaluation mode, without gradients of its parameters.

        It accepts levels of any schedule: they are matched in λ, and x is rescaled.

        Args:
            device: device of the network.
            student: process of the network that is trained; None: not checked.
            label_wrapper: wraps the network so that it accepts the labels of the training data,
                which index captions if the data has them.

        Returns:
            The guided denoiser.

        Raises:
            ValueError: the weights are missing or corrupt, or do not fit the student (`check`).
        """
        if student is not None:
            self.check(student)
        process = self.process if student is None else self.process_for(student)
        inner = LevelMatchedDenoiser(self._load(torch.device(device), process, label_wrapper))
        return inner if self.guidance == CFG(1.0) else GuidedDenoiser(inner, self.guidance)


@dataclass(frozen=True)
class RunTeacher(Teacher):
    """The network of a training run as a teacher.

    Args:
        folder: folder of the run.
        weights: weights of the run: averaged, raw, or the name of a checkpoint or a file, see
            `Run.read_weights`.
        guidance: guidance rule of the teacher; CFG(1) is the conditional model.

    Raises:
        ValueError: the folder holds no run, or the run does not hold the weights.

    Example:
        >>> RunTeacher("runs/missing")
        Traceback (most recent call last):
        ...
        ValueError: teacher.folder is runs/missing, which does not exist: name the folder of a run
    """

    folder: str
    weights: str = AVERAGED
    guidance: Guidance = CFG(1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", str(self.folder))
        if not self._run.folder.is_dir():
            raise ValueError(
                f"teacher.folder is {self.folder}, which does not exist: name the folder of a run"
            )
        self._run.settings()  # refuses a run without a description of its network
        if not self._run.weight_names():
            raise ValueError(
                f"teacher.folder is {self.folder}, a run without weights: train it first"
            )

    @property
    def _run(self) -> Run:
        return Run(Path(self.folder))

    @cached_property
    def process(self) -> Process:
        return Process.load(self._run.process)

    @cached_property
    def content_hash(self) -> str:
        tensors = self._run.read_weights(self.weights).tensors
        return hash_data([hash_tensors(tensors), to_spec(self.process)])

    def _load(
        self, device: torch.device, process: Process, label_wrapper: LabelWrapper
    ) -> DenoiserProtocol:
        def load() -> nn.Module:
            return self._run.denoiser(device, weights=self.weights).network

        network = _share(("run", self.folder, self.content_hash, str(device)), load)
        return Denoiser(label_wrapper(_freeze(network)), process).eval()


@dataclass(frozen=True)
class PipelineTeacher(Teacher):
    """The network of a diffusers pipeline as a teacher.

    A text-conditioned network receives the captions of the training data as the student does.

    Args:
        pipeline: folder of a diffusers pipeline (`save_pretrained`).
        guidance: guidance rule of the teacher; CFG(1) is the conditional model.

    Raises:
        ValueError: the folder holds no pipeline of diffusers.
    """

    pipeline: str
    guidance: Guidance = CFG(1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pipeline", str(self.pipeline))
        if not Path(self.pipeline).is_dir():
            raise ValueError(
                f"teacher.pipeline is {self.pipeline}, which does not exist: name the folder of a "
                "diffusers pipeline"
            )
        self._index.check_pretrained()

    @cached_property
    def _index(self) -> "PipelineIndex":
        from diffcore.integrations.diffusers.loading.index import PipelineIndex

        return PipelineIndex(Path(self.pipeline))

    @cached_property
    def process(self) -> Process:
        return Process(**self._index.process_fields)

    def process_for(self, student: Process) -> Process:
        fields = self._index.process_fields_of(shape=student.shape)
        return Process(**fields | {"classes": student.classes, "dropout": self._dropout(student)})

    @property
    def needs_prompts(self) -> bool:
        from diffcore.integrations.diffusers.families import TextCondition

        return isinstance(self._index.family.condition, TextCondition)

    def _dropout(self, student: Process) -> float:
        """The share of training samples without condition, which a config does not record."""
        return self._index.family.dropout if student.classes else 0.0

    @cached_property
    def content_hash(self) -> str:
        weights = self._index.weights_hash(self._index.network_name)
        return hash_data([weights, to_spec(self.process)])

    def _load(
        self, device: torch.device, process: Process, label_wrapper: LabelWrapper
    ) -> DenoiserProtocol:
        from diffcore.integrations.diffusers.pipeline.pretrained_network import PretrainedNetwork

        def load() -> nn.Module:
            return PretrainedNetwork(self.pipeline).to(device)

        network = _share(("pipeline", self.pipeline, self.content_hash, str(device)), load)
        return Denoiser(label_wrapper(_freeze(network)), process).eval()


@dataclass(frozen=True)
class OracleTeacher(Teacher):
    """An exact denoiser as a teacher, or another one that is built in Python.

    Args:
        oracle: denoiser, such as one of `diffcore.core.oracle`.
        guidance: guidance rule of the teacher; CFG(1) is the conditional model.

    Example:
        >>> from diffcore.core.oracle import GaussianMixture
        >>> oracle = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None])
        >>> teacher = OracleTeacher(oracle).denoiser()
        >>> teacher(torch.ones(3, 2), oracle.process.schedule.level(0.5)).x0.shape
        torch.Size([3, 2])
    """

    oracle: DenoiserProtocol
    guidance: Guidance = CFG(1.0)

    @property
    def process(self) -> Process:
        return self.oracle.process

    @cached_property
    def content_hash(self) -> str:
        network = self.oracle.network
        tensors = vars(self.oracle) if network is None else network.state_dict()
        values = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
        return hash_data([hash_tensors(values), to_spec(self.process)])

    def _load(
        self, device: torch.device, process: Process, label_wrapper: LabelWrapper
    ) -> DenoiserProtocol:
        if self.oracle.network is not None:
            _freeze(self.oracle.network.to(device))
        return self.oracle


def check_teacher(teacher: object) -> None:
    """Raise TypeError if the teacher of an objective is none.

    Args:
        teacher: field of an objective.
    """
    if not isinstance(teacher, Teacher):
        raise TypeError(
            f"teacher is {teacher!r}, expected a Teacher: RunTeacher(folder), "
            "PipelineTeacher(folder) or OracleTeacher(denoiser)"
        )


def check_same_process(student: Process, teacher: Process) -> None:
    """Check that the pair (x_0, ε) of a teacher is one for x of a student.

    Schedules, scalings and prediction types may differ: levels are matched in λ, and x is rescaled.

    Args:
        student: process of the student.
        teacher: process of the teacher.

    Raises:
        ValueError: shape, range, classes or conditions differ, the teacher gives no posterior mean,
            or the student has levels at which the teacher cannot be evaluated.
    """
    if teacher.estimate != "posterior_mean":
        raise ValueError(
            f"the teacher estimates the {teacher.estimate} of its process, expected the "
            "posterior_mean: name a teacher that was trained by denoising"
        )
    for name in ("shape", "low", "high", "classes", "conditions"):
        own, other = getattr(student, name), getattr(teacher, name)
        if own != other:
            raise ValueError(
                f"process.{name} of the student is {own}, but that of the teacher is {other}: give "
                f"the student the teacher's {name}"
            )
    schedule = student.schedule
    level = schedule.level(NOISIEST if schedule.steps is None else 1.0)
    try:
        teacher.check_level(teacher.schedule.at(level.logsnr), "the student's noisiest level")
    except ValueError as error:
        raise ValueError(
            f"the teacher cannot be evaluated at the levels of the student's {schedule}: {error}; "
            f"or give the student the teacher's schedule"
        ) from None


def _check_guidance(guidance: Guidance, process: Process) -> None:
    """Raise ValueError if a rule lacks a reference, has a state, or takes one level at a time."""
    times = torch.tensor([0.25, 0.75], dtype=torch.float64).view(2, *[1] * len(process.shape))
    level = process.schedule.level(times)
    try:
        references = guidance.required_references(Step(process, level, level, level), None)
    except (RuntimeError, TypeError):  # a tensor of levels is no number
        references = None
    if references is None or guidance.depends_on_steps or guidance.levels(process):
        raise ValueError(
            f"teacher.guidance is {guidance}, which cannot be evaluated at a level of each sample: "
            "use CFG with a number as its scale"
        )
    labels = [0] if process.dropouts else None
    for reference in references:
        reference.check(process, labels, str(guidance))


def _share(key: tuple[str, ...], load: Callable[[], nn.Module]) -> nn.Module:
    """The network of a key, which is loaded unless it is in use."""
    network = _shared.get(key)
    if network is None:
        network = _shared[key] = load()
    return network


def _freeze(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)
