"""The options of `diffcore sample`: which samples to draw, how, and where to write them."""

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import register_type

from diffcore.caches import Cache
from diffcore.cli.image_model import PipelineOptions
from diffcore.guidance import CFG, Guidance
from diffcore.run import AVERAGED
from diffcore.samplers import Sampler
from diffcore.sampling import pictures
from diffcore.sampling.files import ARRAY_SUFFIXES, SampleKey
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.sampling.pictures import Picture
from diffcore.schedules import CoordinateGrid, Grid, Within

__all__ = ["MAXIMUM_COUNT", "MAXIMUM_THREADS", "IntegerList", "SampleRequest"]

MAXIMUM_COUNT = 1_000_000
"""Largest number of samples of one command."""

MAXIMUM_THREADS = 1024
"""Far more threads than processors end torch with a segmentation fault."""


class IntegerList(tuple[int, ...]):
    """Integers written as "0-9,12": single ones and inclusive ranges, in the given order."""

    __slots__ = ()

    @classmethod
    def parse(cls, value: Any) -> "IntegerList":
        """Read integers from text, from one integer, or from a list of both.

        Args:
            value: text such as "0-9,12", an integer, or an iterable of them.

        Returns:
            The integers, in the given order, with repetitions.

        Raises:
            ValueError: the text is not a list of integers and ranges, a range runs backwards, or
                there are too many integers.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            return cls((value,))
        if isinstance(value, Iterable) and not isinstance(value, str):
            return cls(number for item in value for number in cls.parse(item))
        parts = [part.strip() for part in str(value).split(",")]
        return cls(number for part in parts for number in _parse_range(part))

    def __str__(self) -> str:
        return ",".join(str(number) for number in self)


register_type(IntegerList, serializer=str, deserializer=IntegerList.parse)


def _parse_range(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number or a range such as 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {text} runs backwards")
    if last - first >= MAXIMUM_COUNT:
        raise ValueError(
            f"the range {text} has {last - first + 1:,} integers, expected at most "
            f"{MAXIMUM_COUNT:,}: draw them in several calls"
        )
    return range(first, last + 1)


@dataclass(frozen=True)
class SampleRequest:
    """Which samples to draw, how, and where to write them.

    Args:
        labels: class labels, such as 0-9,12. Without labels and prompts the samples are
            unconditional.
        prompt: text prompt, for text-conditioned pipelines; may be repeated, and takes the place of
            a label.
        condition: values of named conditions, `--condition.NAME VALUE`: an image, an .npy or
            .safetensors file of one value or several, or numbers such as 0.5,-1. Of several values
            (in the order of the labels, if there are any), each has per_label samples.
        lora: adapter of a pipeline, as FILE or FILE=STRENGTH; may be repeated. It is a file in the
            format of diffusers, kohya or ComfyUI, or the folder of a run with its scheduler.
        weights: weights of a run: averaged, raw (the trained weights in the newest checkpoint), a
            checkpoint such as step-00000400 or step-00000400/raw, or a safetensors file.
        negative: negative prompt that guidance moves away from; empty: the pipeline's unconditional
            prompt.
        height: height of a pipeline's images in pixels; 0: the network's default.
        width: width of a pipeline's images in pixels; 0: the network's default.
        per_label: number of samples for each label or prompt.
        n: number of samples in all, such as 50000, written to a folder: sample k has seed k, and
            the labels or prompts take turns. 0: per_label samples of each label.
        seeds: one 64-bit seed for each sample, such as 0-79, label after label; default: 0, 1, 2,
            ...
        sampler: numerical integrator.
        grid: rule that places the noise levels (knots).
        steps: number of sampler steps.
        guidance: rule that strengthens the condition.
        cache: rule by which features of the network are reused at neighbouring noise levels, such
            as DeepCache; evaluations are cheaper and samples approximate. null: none.
        image: image file to start from; every seed adds other noise to it.
        start: noise level σ/α of the noise added to the image; 0: the first level of the grid.
        batch_size: number of samples drawn together. Another batch size changes samples by rounding
            errors only.
        micro_batch: number of samples in one network call, those of guidance included; 0: all of a
            batch. A lower number saves memory.
        path: whether the noise of stochastic steps follows one Brownian path per seed, so that more
            steps give a nearby sample.
        out: where to write: one picture of all samples (.png, or .gif for an animation of volumes
            and video), arrays (.safetensors, .npz, .npy), or a folder for one file per sample.
            Only a folder is written while samples are drawn, continued by a restart, and shared by
            the ranks of a launcher.
        arrays: file (.safetensors, .npz, .npy) for the samples as arrays, beside a picture.
        picture: kind of picture: images, points (scatter), lines (signals), frames (volumes,
            video), or auto, which the shape of the samples decides.
        threads: number of processor threads; 0: torch's default. The last bits of the samples
            depend on it.
        device: device of the network: auto, cpu, cuda, ...
        print_knots: whether to print all noise levels, and not only the first and last ones.
    """

    labels: IntegerList = field(default_factory=IntegerList)
    prompt: tuple[str, ...] = ()
    condition: dict[str, str] = field(default_factory=dict)
    lora: tuple[str, ...] = ()
    weights: str = AVERAGED
    negative: str = ""
    height: int = 0
    width: int = 0
    per_label: int = 1
    n: int = 0
    seeds: IntegerList = field(default_factory=IntegerList)
    sampler: Sampler = field(default_factory=lambda: DEFAULT_SAMPLER)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    cache: Cache | None = None
    image: Path | None = None
    start: float = 0.0
    batch_size: int = 64
    micro_batch: int = 0
    path: bool = False
    out: Path = Path("samples.png")
    arrays: Path | None = None
    picture: Picture = "auto"
    threads: int = 0
    device: str = "auto"
    print_knots: bool = False

    def __post_init__(self) -> None:
        if self.per_label < 1:
            raise ValueError(f"per_label is {self.per_label}, expected at least 1")
        if not 0 <= self.threads <= MAXIMUM_THREADS:
            raise ValueError(
                f"threads is {self.threads}, expected at most {MAXIMUM_THREADS}, or 0 for torch's "
                "choice"
            )
        if len(self.unique_labels or "1") * self.per_label > MAXIMUM_COUNT:
            raise ValueError(
                f"per_label is {self.per_label}, expected at most {MAXIMUM_COUNT:,} samples in all"
            )
        self._check_count()
        self._check_start()
        self._check_arrays()
        if self.labels and self.prompt:
            raise ValueError(
                "labels and prompts were given, expected one of them: a prompt stands in place of "
                "a label"
            )
        name, expected = "prompts" if self.prompt else "labels", len(self.sample_labels or ())
        if self.seeds and (expected or self.n) and len(self.seeds) != (expected or self.n):
            product = f"{len(self.unique_labels)} {name} x {self.per_label}"
            raise ValueError(
                f"seeds are {len(self.seeds)}, expected {expected or self.n}: "
                f"{f'n is {self.n}' if self.n else product}"
            )

    def _check_count(self) -> None:
        if not 0 <= self.n <= MAXIMUM_COUNT:
            raise ValueError(f"n is {self.n}, expected a number of samples up to {MAXIMUM_COUNT:,}")
        if self.n and self.per_label != 1:
            raise ValueError(f"n is {self.n} and per_label {self.per_label}: give one of them")
        if self.n and self.out.suffix in pictures.SUFFIXES:
            raise ValueError(
                f"n is {self.n}, and out is {self.out}, one picture: set --out to a folder, or to "
                "a file of arrays"
            )

    def _check_start(self) -> None:
        if not 0 <= self.start < math.inf:
            raise ValueError(
                f"start is {self.start}, expected σ/α above 0, or 0 for where the grid begins"
            )
        if self.start and self.image is None:
            raise ValueError(
                f"start is {self.start}, but there is no image to start from: pass --image"
            )
        if self.start and not isinstance(self.grid, CoordinateGrid):
            raise ValueError(
                f"start is {self.start}, but {self.grid} names its first knot itself: "
                "leave start out"
            )

    def _check_arrays(self) -> None:
        if self.arrays is None:
            return
        if self.arrays.suffix not in ARRAY_SUFFIXES:
            raise ValueError(
                f"arrays is {self.arrays}, expected a file of suffix {', '.join(ARRAY_SUFFIXES)}"
            )
        if self.out.suffix not in pictures.SUFFIXES:
            raise ValueError(
                f"arrays is {self.arrays}, beside {self.out}, which is no picture: leave arrays "
                f"out, or set out to a file of suffix {', '.join(pictures.SUFFIXES)}"
            )

    @property
    def started_grid(self) -> Grid:
        """The grid, which begins at the noise level `start` if there is one."""
        if not self.start or not isinstance(self.grid, CoordinateGrid):
            return self.grid
        return Within(self.grid, low=-2 * math.log(self.start))

    @property
    def pipeline_options(self) -> PipelineOptions:
        """The options that only pipelines have."""
        return PipelineOptions(self.prompt, self.negative, self.height, self.width, self.lora)

    @property
    def unique_labels(self) -> Sequence[int]:
        """The labels, each once, in the given order; prompt k is label k."""
        return range(len(self.prompt)) if self.prompt else self.labels

    @property
    def label_names(self) -> list[str]:
        """A short name of each label or prompt, for the margin of an image."""
        if self.prompt:
            return [textwrap.shorten(text, 40, placeholder="…") for text in self.prompt]
        return [str(label) for label in self.labels]

    @property
    def sample_labels(self) -> list[int] | None:
        """The label of each sample, or None for unconditional samples."""
        if self.n and self.unique_labels:
            labels = self.unique_labels
            return [labels[index % len(labels)] for index in range(self.n)]
        return [label for label in self.unique_labels for _ in range(self.per_label)] or None

    @property
    def sample_seeds(self) -> list[int]:
        """The seed of each sample."""
        count = len(self.sample_labels or range(self.n or self.per_label))
        return list(self.seeds) or list(range(count))

    def sample_keys(self, null_label: int, values: int = 1) -> list[SampleKey]:
        """Label, seed and value of the named conditions of each sample.

        Args:
            null_label: label of samples without one.
            values: number of values of the named conditions.

        Returns:
            One key for each sample, in the order of the file.

        Raises:
            ValueError: there is not one value for each label, or not one seed for each sample.
        """
        if values == 1 or self.n:
            seeds = self.sample_seeds
            labels = self.sample_labels or [null_label] * len(seeds)
            pairs = enumerate(zip(labels, seeds, strict=True))
            return [SampleKey(label, seed, index % values) for index, (label, seed) in pairs]
        labels = list(self.unique_labels) or [null_label] * values
        if len(labels) != values:
            raise ValueError(
                f"the conditions have {values} values for {len(labels)} labels or prompts, "
                "expected one value for each, or one for all"
            )
        rows = [(row, label) for row, label in enumerate(labels) for _ in range(self.per_label)]
        seeds = list(self.seeds) or list(range(len(rows)))
        if len(seeds) != len(rows):
            raise ValueError(
                f"seeds are {len(seeds)}, expected {len(rows)}: {values} values of the conditions "
                f"x {self.per_label}"
            )
        return [SampleKey(label, seed, row) for (row, label), seed in zip(rows, seeds, strict=True)]
