"""`diffcore sample`: images of a run or of a diffusers pipeline, by label or prompt and by seed."""

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffcore.cli.arguments import Ints, default_to, gathered, normalized, trusted
from diffcore.cli.source import Source, Wanted, settings, source
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, loaded
from diffcore.io.parser import ComponentParser
from diffcore.io.safetensors import write_weights
from diffcore.samplers import Sampler
from diffcore.sampling import images
from diffcore.sampling.generation import GRID, SAMPLER, sample
from diffcore.schedules import CoordinateGrid, Grid, Level, Within


@dataclass(frozen=True)
class Request:
    """What to sample and where to put it.

    Args:
        labels: class labels, such as 0-9; none samples without a condition.
        prompt: of a pipeline that is told text: a prompt in place of a label; may be repeated.
        negative: the prompt to be guided away from, in place of none.
        height: of a pipeline's images in pixels, 0 for its network's own.
        width: of a pipeline's images in pixels, 0 for its network's own.
        per_label: samples of each label or prompt.
        seeds: one a sample, such as 0-79; label after label. 0, 1, 2 ... by default.
        sampler: the integrator.
        grid: which levels it visits.
        steps: how many steps it takes.
        guidance: how the condition is strengthened.
        image: a picture to start from; each seed changes it in its own way.
        start: σ/α of the noise put on the image (the start level, not a share of the steps); 0 is where the grid begins.
        batch_size: samples integrated together; other sizes agree to rounding.
        rows: of one forward, where those samples and their references are too many; 0 asks about all at once.
        path: whether the noise of a stochastic sampler's steps is the increments of one path a seed, so that the same seed with
            more steps gives a nearby sample.
        out: a picture (.png) of all samples, a folder for one picture a seed, or arrays (.safetensors).
        threads: of the processor, 0 for torch's own choice; the last bits depend on it.
        device: auto, cpu, cuda, ...
        print_knots: whether to print each knot rather than the ends alone.
    """

    labels: Ints = field(default_factory=Ints)
    prompt: tuple[str, ...] = ()
    negative: str = ""
    height: int = 0
    width: int = 0
    per_label: int = 1
    seeds: Ints = field(default_factory=Ints)
    sampler: Sampler = field(default_factory=lambda: SAMPLER)
    grid: Grid = field(default_factory=lambda: GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    image: Path | None = None
    start: float = 0.0
    batch_size: int = 64
    rows: int = 0
    path: bool = False
    out: Path = Path("samples.png")
    threads: int = 0
    device: str = "auto"
    print_knots: bool = False

    def __post_init__(self) -> None:
        if self.per_label < 1:
            raise ValueError(f"per_label is {self.per_label}, expected at least 1")
        if self.threads < 0:
            raise ValueError(
                f"threads is {self.threads}, expected a number, or 0 for torch's choice"
            )
        self._check_start()
        if self.labels and self.prompt:
            raise ValueError(
                "labels and prompts were given, expected one of them: a prompt stands in place of a label"
            )
        what, expected = "prompts" if self.prompt else "labels", len(self.chosen) * self.per_label
        if self.chosen and self.seeds and len(self.seeds) != expected:
            raise ValueError(
                f"seeds are {len(self.seeds)}, expected {expected}: {len(self.chosen)} {what} x {self.per_label}"
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
                f"start is {self.start}, but {self.grid} names its first knot itself: leave start out"
            )

    @property
    def visited(self) -> Grid:
        """The grid from the start level on."""
        if not self.start or not isinstance(self.grid, CoordinateGrid):
            return self.grid
        return Within(self.grid, low=-2 * math.log(self.start))

    @property
    def wanted(self) -> Wanted:
        """What concerns pipelines alone."""
        return Wanted(self.prompt, self.negative, self.height, self.width)

    @property
    def chosen(self) -> Sequence[int]:
        """The labels, each once: prompt k is label k."""
        return range(len(self.prompt)) if self.prompt else self.labels

    @property
    def names(self) -> list[str]:
        """Of these labels, for a picture."""
        return [textwrap.shorten(text, 40, placeholder="…") for text in self.prompt] or [
            str(n) for n in self.labels
        ]

    @property
    def condition(self) -> list[int] | None:
        """The label of each sample."""
        return [label for label in self.chosen for _ in range(self.per_label)] or None

    @property
    def numbers(self) -> list[int]:
        """The seed of each sample."""
        return list(self.seeds) or list(range(len(self.condition or range(self.per_label))))


def main(argv: Sequence[str]) -> None:
    """Sample the run or the pipeline that the first argument names."""
    parser = ComponentParser(
        prog="diffcore sample",
        usage="diffcore sample RUN [--option value ...]",
        description="Sample the run in folder RUN, or the diffusers pipeline saved there. Sampler, grid, steps and guidance "
        "are the run's unless told otherwise; of a pipeline, guidance is CFG at its own scale.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_argument(
        "run", type=str, metavar="RUN", help="the folder of a run or of a diffusers pipeline"
    )
    parser.add_class_arguments(Request)
    argv = gathered(trusted(normalized(argv)), "prompt")
    if argv and not argv[0].startswith("-"):
        default_to(parser, settings(Path(argv[0])), argv)
    elif not {"-h", "--help"} & set(argv) and not any(".help" in word for word in argv):
        raise ValueError("the run's folder comes first: diffcore sample RUN --option value ...")
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    arguments.pop("config", None)
    _sample(Path(arguments.pop("run")), Request(**arguments))


def _sample(folder: Path, request: Request) -> None:
    if request.threads:
        torch.set_num_threads(request.threads)
    device = _device(request.device)
    opened = source(folder, request.wanted, device)
    _check_labels(request.labels, opened)
    _check_out(request.out, opened.pictures)
    image = (
        None
        if request.image is None
        else opened.encode(images.load(request.image, opened.pictures))
    )
    made = sample(
        opened.denoiser,
        request.sampler,
        request.visited,
        request.steps,
        seeds=request.numbers,
        condition=request.condition,
        guidance=loaded(
            request.guidance, lambda weaker: source(Path(weaker), request.wanted, device).denoiser
        ),
        image=image,
        batch_size=request.batch_size,
        rows=request.rows,
        path=request.path,
        progress=sys.stderr.isatty(),
    )
    _write(opened.decode(made.x), request, opened)
    print(_knots(made.knots, request.print_knots))
    print(
        f"{len(made.x)} samples of {made.evaluations:g} network evaluations each, {_planned(made.planned)} "
        f"({request.sampler}, {request.visited}, {len(made.knots) - 1} steps, {request.guidance}) -> {request.out}"
    )


def _planned(evaluations: int | None) -> str:
    return "as the sampler decided" if evaluations is None else f"{evaluations} planned"


def _write(x: Tensor, request: Request, opened: Source) -> None:
    out, pictures = request.out, opened.pictures
    labels = torch.tensor(request.condition or [opened.denoiser.process.classes] * len(x))
    if out.suffix == ".safetensors":
        out.parent.mkdir(parents=True, exist_ok=True)
        write_weights(out, {"x": x, "seed": torch.tensor(request.numbers), "label": labels})
    elif out.suffix == ".png":
        per_row = request.per_label if request.chosen else min(len(x), 10)
        names = request.names or [""] * -(-len(x) // per_row)
        images.save(images.grid(x, pictures, names, per_row), out)
    else:
        kind = "prompt" if request.prompt else "label"
        for seed, label, tile in zip(
            request.numbers, labels.tolist(), images.pixels(x, pictures), strict=True
        ):
            name = f"{kind}-{label}-seed-{seed}.png" if request.chosen else f"seed-{seed}.png"
            images.save(images.image(tile), out / name)


def _check_labels(labels: Ints, opened: Source) -> None:
    """Refuse labels of a text, and the null label, which `sample` knows: a row named by it would pass for a class."""
    if labels and opened.text:
        raise ValueError("the network is told text, not labels: ask for --prompt TEXT")
    process = opened.denoiser.process
    wrong = [label for label in labels if process.classes and label >= process.classes]
    if wrong:
        raise ValueError(
            f"labels {wrong} are out of range, expected 0 .. {process.classes - 1}; leave --labels out for none"
        )


def _check_out(out: Path, process: Process) -> None:
    """Refuse before sampling what could not be written after it."""
    if out.suffix not in (".png", ".safetensors", ""):
        raise ValueError(f"out is {out}, expected a .png, a .safetensors, or a folder")
    if out.suffix != ".safetensors":
        images.check(process)
    if out.suffix and out.is_dir():
        raise ValueError(f"out is {out}, which is a folder")


def _device(name: str) -> torch.device:
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {name!r}, which torch does not have here ({error}): use auto or cpu"
        ) from None


def _knots(knots: tuple[Level, ...], every: bool) -> str:
    """The knots as a table: λ, t, α, σ, σ/α."""
    shown = knots if every else tuple(dict.fromkeys((knots[0], knots[-2], knots[-1])))
    lines = [
        f"{len(knots)} knots"
        + ("" if every else " (first, last noisy, last; all with --print-knots true)")
    ]
    lines.append(f"{'λ':>10} {'t':>8} {'α':>9} {'σ':>9} {'σ/α':>10}")
    lines += [
        f"{k.logsnr:>10.4f} {k.t:>8.5f} {k.alpha:>9.6f} {k.sigma:>9.6f} {k.ratio:>10.5g}"
        for k in shown
    ]
    return "\n".join(lines)
