"""`diffcore sample`: draw samples of a run or a diffusers pipeline by label, prompt and seed."""

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffcore.cli.arguments import extract_option
from diffcore.cli.image_model import (
    ImageModel,
    PipelineOptions,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.integers import MAXIMUM_COUNT, IntegerList
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, load_weaker_networks
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import write_weights
from diffcore.samplers import Sampler
from diffcore.sampling import images
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER, sample
from diffcore.schedules import CoordinateGrid, Grid, Level, Within

__all__ = ["SampleRequest", "main"]

MAXIMUM_THREADS = 1024
"""Far more threads than processors end torch with a segmentation fault."""


@dataclass(frozen=True)
class SampleRequest:
    """Which samples to draw, how, and where to write them.

    Args:
        labels: class labels, such as 0-9,12. Without labels and prompts the samples are
            unconditional.
        prompt: text prompt, for text-conditioned pipelines; may be repeated, and takes the place of
            a label.
        negative: negative prompt that guidance moves away from; empty: the pipeline's unconditional
            prompt.
        height: height of a pipeline's images in pixels; 0: the network's default.
        width: width of a pipeline's images in pixels; 0: the network's default.
        per_label: number of samples for each label or prompt.
        seeds: one 64-bit seed for each sample, such as 0-79, label after label; default: 0, 1, 2,
            ...
        sampler: numerical integrator.
        grid: rule that places the noise levels (knots).
        steps: number of sampler steps.
        guidance: rule that strengthens the condition.
        image: image file to start from; every seed adds other noise to it.
        start: noise level σ/α of the noise added to the image; 0: the first level of the grid.
        batch_size: number of samples drawn together. Another batch size changes samples by rounding
            errors only.
        micro_batch: number of samples in one network call, those of guidance included; 0: all of a
            batch. A lower number saves memory.
        path: whether the noise of stochastic steps follows one Brownian path per seed, so that more
            steps give a nearby sample.
        out: where to write: one image of all samples (.png), a folder for one image per sample, or
            arrays (.safetensors).
        threads: number of processor threads; 0: torch's default. The last bits of the samples
            depend on it.
        device: device of the network: auto, cpu, cuda, ...
        print_knots: whether to print all noise levels, and not only the first and last ones.
    """

    labels: IntegerList = field(default_factory=IntegerList)
    prompt: tuple[str, ...] = ()
    negative: str = ""
    height: int = 0
    width: int = 0
    per_label: int = 1
    seeds: IntegerList = field(default_factory=IntegerList)
    sampler: Sampler = field(default_factory=lambda: DEFAULT_SAMPLER)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    image: Path | None = None
    start: float = 0.0
    batch_size: int = 64
    micro_batch: int = 0
    path: bool = False
    out: Path = Path("samples.png")
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
        self._check_start()
        if self.labels and self.prompt:
            raise ValueError(
                "labels and prompts were given, expected one of them: a prompt stands in place of "
                "a label"
            )
        name, expected = "prompts" if self.prompt else "labels", len(self.sample_labels or ())
        if self.seeds and expected and len(self.seeds) != expected:
            raise ValueError(
                f"seeds are {len(self.seeds)}, expected {expected}: "
                f"{len(self.unique_labels)} {name} x {self.per_label}"
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

    @property
    def started_grid(self) -> Grid:
        """The grid, which begins at the noise level `start` if there is one."""
        if not self.start or not isinstance(self.grid, CoordinateGrid):
            return self.grid
        return Within(self.grid, low=-2 * math.log(self.start))

    @property
    def pipeline_options(self) -> PipelineOptions:
        """The options that only pipelines have."""
        return PipelineOptions(self.prompt, self.negative, self.height, self.width)

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
        return [label for label in self.unique_labels for _ in range(self.per_label)] or None

    @property
    def sample_seeds(self) -> list[int]:
        """The seed of each sample."""
        return list(self.seeds) or list(range(len(self.sample_labels or range(self.per_label))))


def main(argv: Sequence[str]) -> None:
    """Draw samples from the run or the pipeline that the first word names.

    Args:
        argv: command-line words after `sample`.
    """
    parser = ComponentParser(
        prog="diffcore sample",
        usage="diffcore sample RUN [--option value ...]",
        description="Draw samples from the run in folder RUN, or from the diffusers pipeline "
        "saved there. The run's sampler, grid, steps and guidance replace the defaults below; a "
        "pipeline's default is CFG at its own guidance scale.",
    )
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_argument(
        "run", type=str, metavar="RUN", help="folder of a run or of a diffusers pipeline"
    )
    parser.add_class_arguments(SampleRequest)
    prompts, words = extract_option(argv, "prompt", "a text", may_be_empty=True)
    if prompts:
        words.append(f"--prompt={json.dumps(prompts)}")
    arguments = parse_with_run_defaults(parser, words, read_sampling_settings)
    arguments.pop("config", None)
    folder = Path(arguments.pop("run"))
    _sample(folder, SampleRequest(**arguments))


def _sample(folder: Path, request: SampleRequest) -> None:
    if request.threads:
        torch.set_num_threads(request.threads)
    device, options = _device(request.device), request.pipeline_options
    model = load_image_model(folder, options, device)
    _check_labels(request.labels, model)
    _check_out(request.out, model.image_process)
    image = None
    if request.image is not None:
        image = model.encode(images.load_image(request.image, model.image_process))
    samples = sample(
        model.denoiser,
        request.sampler,
        request.started_grid,
        request.steps,
        seeds=request.sample_seeds,
        condition=request.sample_labels,
        guidance=load_weaker_networks(
            request.guidance,
            lambda weaker: load_image_model(Path(weaker), options, device).denoiser,
        ),
        image=image,
        batch_size=request.batch_size,
        micro_batch=request.micro_batch,
        path=request.path,
        progress=sys.stderr.isatty(),
    )
    _write(model.decode(samples.x), request, model)
    print(_knot_table(samples.knots, request.print_knots))
    print(
        f"{len(samples.x)} samples of {samples.evaluations:g} network evaluations each, "
        f"{_plan(samples.planned)} ({request.sampler}, {request.started_grid}, "
        f"{len(samples.knots) - 1} steps, {request.guidance}) -> {request.out}"
    )


def _plan(evaluations: int | None) -> str:
    return "as the sampler decided" if evaluations is None else f"{evaluations} planned"


def _write(x: Tensor, request: SampleRequest, model: ImageModel) -> None:
    """Write images or samples (N, *shape) as the suffix of `out` requires."""
    out, process = request.out, model.image_process
    labels = torch.tensor(request.sample_labels or [model.denoiser.process.classes] * len(x))
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        write_weights(out, {"x": x, "seed": torch.tensor(request.sample_seeds), "label": labels})
    elif out.suffix == ".png":
        columns = request.per_label if request.unique_labels else min(len(x), 10)
        names = request.label_names or [""] * math.ceil(len(x) / columns)
        images.save_image(images.draw_grid(x, process, names, columns), out)
    else:
        condition = "prompt" if request.prompt else "label"
        for seed, label, pixels in zip(
            request.sample_seeds, labels.tolist(), images.to_pixels(x, process), strict=True
        ):
            prefix = f"{condition}-{label}-" if request.unique_labels else ""
            images.save_image(images.to_image(pixels), out / f"{prefix}seed-{seed}.png")


def _check_labels(labels: IntegerList, model: ImageModel) -> None:
    """Refuse labels of a text-conditioned network, and the null label, which is not a class."""
    if labels and model.is_text_conditioned:
        raise ValueError("the network is conditioned on text, not on labels: use --prompt TEXT")
    classes = model.denoiser.process.classes
    wrong = [label for label in labels if classes and label >= classes]
    if wrong:
        raise ValueError(
            f"labels {wrong} are out of range, expected 0 .. {classes - 1}; leave --labels out for "
            "unconditional samples"
        )


def _check_out(out: Path, process: Process) -> None:
    """Refuse before sampling what could not be written after it."""
    if out.suffix not in (".png", ".safetensors", ""):
        raise ValueError(f"out is {out}, expected a .png, a .safetensors, or a folder")
    if out.suffix != ".safetensors":
        images.check_image(process)
    if out.suffix and out.is_dir():
        raise ValueError(f"out is {out}, which is a folder")


def _device(name: str) -> torch.device:
    if name == "auto":
        has_accelerator = torch.accelerator.is_available()
        found = torch.accelerator.current_accelerator() if has_accelerator else None
        return found or torch.device("cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {name!r}, which torch does not have here ({error}): use auto or cpu"
        ) from None


def _knot_table(knots: tuple[Level, ...], show_all: bool) -> str:
    """The noise levels as a table: λ, t, α, σ, σ/α."""
    shown = knots if show_all else tuple(dict.fromkeys((knots[0], knots[-2], knots[-1])))
    note = "" if show_all else " (first, last noisy, last; all with --print-knots true)"
    lines = [
        f"{len(knots)} knots{note}",
        f"{'λ':>10} {'t':>8} {'α':>9} {'σ':>9} {'σ/α':>10}",
        *(
            f"{k.logsnr:>10.4f} {k.t:>8.5f} {k.alpha:>9.6f} {k.sigma:>9.6f} {k.ratio:>10.5g}"
            for k in shown
        ),
    ]
    return "\n".join(lines)
