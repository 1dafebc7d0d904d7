"""Previews during training: a row of samples for each label or prompt, of the same seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image

from diffcore.core.conditions import LABEL
from diffcore.core.denoiser import Denoiser
from diffcore.core.process import Process
from diffcore.sampling import pictures
from diffcore.sampling.generation import Samples
from diffcore.sampling.pictures import Picture
from diffcore.training.data.checks import read_item
from diffcore.training.data.source import DataSource

__all__ = ["PreviewSamples", "Previews", "check_drawable", "preview"]

ROWS, UNLABELLED_ROWS, LETTERS = 10, 4, 24
MAXIMUM_BATCH = 40
"""Largest number of samples that are drawn together."""


class PreviewSamples(NamedTuple):
    """The samples of a preview, row after row.

    Args:
        seeds: seed of each sample.
        condition: label of each sample; None without classes.
        rows: name of each row.
        per_row: number of samples in a row.
    """

    seeds: Sequence[int]
    condition: list[int] | None
    rows: list[str]
    per_row: int


@dataclass(frozen=True)
class Previews:
    """What the previews of a run show: labels or prompts, and the seeds of their samples.

    Args:
        labels: labels, one row each: classes, or indices into the captions of the data. Without
            labels and prompts: the first ten.
        prompts: texts in place of labels, for data with captions. They are encoded once, before the
            training.
        negative: text in place of the empty prompt, from which guidance extrapolates away; only
            with prompts.
        per_label: number of samples of each label or prompt; 0: four pictures, or 500 points.
        seeds: 64-bit seed of each sample, label after label; []: 0, 1, 2, ...

    Raises:
        ValueError: Labels and prompts are combined, or a number does not fit.
    """

    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    negative: str = ""
    per_label: int = 0
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "prompts", "seeds"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"previews.{name} is {value!r}, expected a list")
            object.__setattr__(self, name, tuple(value))
        if self.labels and self.prompts:
            raise ValueError(
                "previews.labels and previews.prompts were given, expected one of them: a prompt "
                "stands in place of a label"
            )
        if self.negative and not self.prompts:
            raise ValueError(
                f"previews.negative is {self.negative!r} without previews.prompts, to which it "
                "belongs: add prompts, or leave it out"
            )
        if self.per_label < 0:
            raise ValueError(f"previews.per_label is {self.per_label}, expected at least 0")
        if wrong := [seed for seed in self.seeds if not -(2**63) <= seed < 2**63]:
            raise ValueError(f"previews.seeds has {wrong[0]}, expected within [-2^63, 2^63)")

    def process(self, process: Process) -> Process:
        """The process of the samples, of which prompt k is label k.

        Args:
            process: process of the run.
        """
        return replace(process, classes=len(self.prompts)) if self.prompts else process

    def samples(
        self, data: DataSource, process: Process, picture: Picture = "auto"
    ) -> PreviewSamples:
        """The seeds, labels and names of the samples, checked against data and process.

        Args:
            data: data source, which names the labels.
            process: process of the run.
            picture: kind of picture, which `check_drawable` has accepted.

        Returns:
            The samples.

        Raises:
            ValueError: A label is out of range, the network takes no text, or the number of seeds
                is another one than that of samples.
        """
        if self.prompts and not data.texts:
            raise ValueError(
                "previews.prompts was given, but the data has no captions, so that the network is "
                "trained without text: use previews.labels"
            )
        labels = list(range(len(self.prompts)) or self.labels or range(min(process.classes, ROWS)))
        if wrong := [] if self.prompts else _out_of_range(labels, process.classes):
            expected = f"0 .. {process.classes}" if process.classes else "no label without classes"
            raise ValueError(f"previews.labels has {wrong[0]}, expected {expected}")
        names = [
            self.prompts[label][:LETTERS] if self.prompts else _name(data, label, process.classes)
            for label in labels
        ]
        kind = "images" if data.is_latent else pictures.picture_of(process, picture)
        per_row = self.per_label or pictures.COLUMNS[kind].preview
        if not labels:
            is_one_cloud = kind == "points" and not process.conditions
            count = len(self.seeds) or per_row * (1 if is_one_cloud else UNLABELLED_ROWS)
            rows = [""] * -(-count // per_row)
            return PreviewSamples(self.seeds or range(count), None, rows, per_row)
        condition = [label for label in labels for _ in range(per_row)]
        if self.seeds and len(self.seeds) != len(condition):
            raise ValueError(
                f"previews.seeds are {len(self.seeds)}, expected {len(condition)}: {len(labels)} "
                f"{'prompts' if self.prompts else 'labels'} x {per_row}"
            )
        return PreviewSamples(self.seeds or range(len(condition)), condition, names, per_row)


def check_drawable(data: DataSource, process: Process, picture: Picture = "auto") -> None:
    """Raise ValueError if samples are neither latents that the data set decodes nor can be drawn.

    Args:
        data: data source.
        process: process with the shape of the samples.
        picture: kind of picture.
    """
    if not data.is_latent:
        pictures.picture_of(process, picture)


def preview(
    denoiser: Denoiser,
    data: DataSource,
    shown: PreviewSamples,
    draw: Callable[..., Samples],
    picture: Picture = "auto",
) -> Image.Image:
    """A picture of samples of a denoiser.

    Args:
        denoiser: network with the process of the samples.
        data: data source, which decodes latents.
        shown: seeds, labels and names of the samples.
        draw: called as `draw(denoiser, seeds=, condition=, batch_size=)`.
        picture: kind of picture; auto: by the shape of the samples.

    Returns:
        The picture, one row (for points, one colour) for each label; of named conditions, a row has
        those of one item of the data.
    """
    process, batch = denoiser.process, min(len(shown.seeds), max(MAXIMUM_BATCH, shown.per_row))
    condition = _conditions(data, process, shown)
    x = draw(denoiser, seeds=shown.seeds, condition=condition, batch_size=batch).x
    if data.is_latent:
        x, picture = data.decode(x), "auto"
        process = Process(shape=tuple(x.shape[1:]))
    return pictures.draw(x, process, shown.rows, shown.per_row, picture)


def _conditions(data: DataSource, process: Process, shown: PreviewSamples) -> Any:
    """The condition of each sample: its label, and the named ones of the item of its row.

    The items are spread evenly over the data.
    """
    if not process.conditions:
        return shown.condition
    rows = [sample // shown.per_row for sample in range(len(shown.seeds))]
    indices = [row * len(data) // len(shown.rows) for row in rows]
    items = [read_item(partial(data.__getitem__, i), i, process) for i in indices]
    named = {
        name: torch.stack([item.extras[name] for item in items]) for name in process.conditions
    }
    return named | ({LABEL: shown.condition} if shown.condition else {})


def _out_of_range(labels: list[int], classes: int) -> list[int]:
    return [label for label in labels if not classes or not 0 <= label <= classes]


def _name(data: DataSource, label: int, null: int) -> str:
    names = data.texts or data.class_names
    if label == null:
        return "none"
    return names[label][:LETTERS] if names else str(label)
