"""The settings of a picture in the playground, which are command-line words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcore.cli.arguments import join_option
from diffcore.cli.image_model import read_sampling_settings
from diffcore.cli.run_defaults import spell_calls
from diffcore.cli.sample_request import MAXIMUM_COUNT, IntegerList
from diffcore.core.oracle import PLANE_NAMES
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance
from diffcore.io.parser import ComponentParser
from diffcore.run import Run
from diffcore.samplers import DDIM, Sampler
from diffcore.sampling.generation import DEFAULT_GRID
from diffcore.schedules import Cosine, Grid, Schedule

__all__ = ["MOST_STEPS", "PictureRequest", "default_request", "is_exact", "parse_request"]

MOST_STEPS = 1000
POINTS, IMAGES, ROWS = 128, 4, 4
"""Number of samples of each label of a distribution and of a network, and largest number of labels
of a network, by default.
"""
MAXIMUM_SAMPLES = 2048
RUN_OPTIONS = {
    "sampler": "sampler",
    "grid": "grid",
    "sample_steps": "steps",
    "guidance": "guidance",
}
"""Setting of a run -> option of the playground."""


@dataclass(frozen=True)
class PictureRequest:
    """What the playground draws, and how it is sampled.

    Args:
        schedule: noise levels of an exact distribution; a run or a pipeline has its own.
        sampler: numerical integrator.
        grid: rule that places the noise levels (knots).
        steps: number of sampler steps.
        guidance: rule that strengthens the condition.
        labels: class labels, such as 0,1. Without labels and prompts the samples are unconditional.
        prompt: text prompt, for text-conditioned pipelines; may be repeated.
        per_label: number of samples for each label or prompt.
        seed: seed of the first sample, which those of the other samples follow.
    """

    schedule: Schedule = field(default_factory=Cosine)
    sampler: Sampler = field(default_factory=DDIM)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    steps: int = 10
    guidance: Guidance = field(default_factory=lambda: CFG(2.0))
    labels: IntegerList = field(default_factory=IntegerList)
    prompt: tuple[str, ...] = ()
    per_label: int = IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps is {self.steps}, expected 1 to {MOST_STEPS:,}")
        if self.per_label < 1 or self.count > MAXIMUM_SAMPLES:
            raise ValueError(
                f"per_label is {self.per_label}, expected at least 1 and at most "
                f"{MAXIMUM_SAMPLES:,} samples in all"
            )
        if not 0 <= self.seed < 2**63 - MAXIMUM_COUNT:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        if self.labels and self.prompt:
            raise ValueError("labels and prompts were given, expected one of them")

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.per_label * max(len(self.prompt or self.labels), 1)

    @property
    def seeds(self) -> range:
        """The seed of each sample."""
        return range(self.seed, self.seed + self.count)

    @property
    def condition(self) -> list[int] | None:
        """The label of each sample, prompt k being label k; None for unconditional samples."""
        labels: Sequence[int] = range(len(self.prompt)) if self.prompt else self.labels
        return [label for label in labels for _ in range(self.per_label)] or None

    @property
    def row_names(self) -> list[str]:
        """The name of each row of samples."""
        return list(self.prompt) or [f"class {label}" for label in self.labels] or [""]


def is_exact(model: str) -> bool:
    """Whether a model is an exact distribution, not the folder of a run or of a pipeline."""
    return model in PLANE_NAMES


def default_request(model: str) -> dict[str, Any]:
    """The options with which a model is drawn first.

    Args:
        model: name of a distribution, or folder of a run or of a pipeline.

    Returns:
        Plain data by the name of the option, for `ComponentParser.set_defaults`.

    Raises:
        ValueError: the folder is neither a run's nor a pipeline's.
    """
    if is_exact(model):
        return {"labels": "0,1", "per_label": POINTS}
    settings, record = read_sampling_settings(Path(model)), Run(Path(model)).process
    options = {option: settings[name] for name, option in RUN_OPTIONS.items() if name in settings}
    if not record.is_file():
        return options
    process = Process.load(record)
    count = POINTS if len(process.shape) == 1 else IMAGES
    return options | {"labels": list(range(min(process.classes, ROWS))), "per_label": count}


def parse_request(model: str, words: Sequence[str]) -> PictureRequest:
    """Read options of a model.

    Args:
        model: name of a distribution, or folder of a run or of a pipeline.
        words: command-line words such as `--sampler=Heun()`; others keep the defaults of the model.

    Returns:
        The settings.

    Raises:
        ValueError: an option is unknown, or its value is not what the option expects.
    """
    parser = ComponentParser(prog="diffcore playground", exit_on_error=False)
    parser.add_class_arguments(PictureRequest)
    parser.set_defaults(default_request(model))
    words = join_option(words, "prompt", "a text", may_be_empty=True)
    return PictureRequest(**parser.instantiate(parser.parse_args(spell_calls(words))).as_dict())
