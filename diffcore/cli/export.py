"""`diffcore export`: a run as a pipeline of diffusers, ours or one of its own."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffcore.cli.arguments import default_to, normalized, trusted
from diffcore.cli.source import Wanted, is_pipeline, settings, source
from diffcore.guidance import CFG, Guidance
from diffcore.io.files import write_folder
from diffcore.io.parser import ComponentParser
from diffcore.samplers import DDIM, DDPM, Sampler
from diffcore.sampling.generation import GRID, SAMPLER
from diffcore.schedules import Grid

if TYPE_CHECKING:
    from diffcore.integrations.diffusers import DiffcorePipeline


@dataclass(frozen=True)
class Request:
    """What to write, and where.

    Args:
        out: the folder to write; new, or of an older pipeline, which is replaced.
        format: diffcore, a DiffcorePipeline; or diffusers, one of its own pipelines, which needs no diffcore, if there is one
            whose samples are ours.
        sampler: of the pipeline, unless a call names another.
        grid: likewise.
        steps: likewise.
        guidance: likewise.
    """

    out: Path
    format: Literal["diffcore", "diffusers"] = "diffcore"
    sampler: Sampler = field(default_factory=lambda: SAMPLER)
    grid: Grid = field(default_factory=lambda: GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)

    def __post_init__(self) -> None:
        if self.out.exists() and not is_pipeline(self.out):
            raise ValueError(
                f"out is {self.out}, which exists and holds no pipeline: name another folder"
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


def main(argv: Sequence[str]) -> None:
    """Write the run that the first argument names."""
    parser = ComponentParser(
        prog="diffcore export",
        usage="diffcore export RUN --out FOLDER [--option value ...]",
        description="Write the averaged network of the run in folder RUN as a pipeline of diffusers. Sampler, grid, steps "
        "and guidance are the run's unless told otherwise.",
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="the folder of a run, or of a DiffcorePipeline"
    )
    parser.add_class_arguments(Request)
    argv = trusted(normalized(argv))
    if argv and not argv[0].startswith("-"):
        default_to(parser, settings(_from(Path(argv[0]))), argv)
    elif not {"-h", "--help"} & set(argv) and not any(".help" in word for word in argv):
        raise ValueError("the run's folder comes first: diffcore export RUN --out FOLDER")
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    _export(Path(arguments.pop("run")), Request(**arguments))


def _from(folder: Path) -> Path:
    """What is read of a run: the pipeline that it left, which has its VAE too."""
    own = folder / "pipeline"
    return own if is_pipeline(own) else folder


def _export(folder: Path, request: Request) -> None:
    pipe = _opened(_from(folder), request)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    if request.format == "diffcore":
        write_folder(request.out, pipe.save_pretrained)
        print(
            f"{folder} -> {request.out}: a DiffcorePipeline, which diffusers loads where diffcore is installed"
        )
        return
    from diffcore.integrations.diffusers.pipeline.export import check, steps_of, stock_of

    stock, found = stock_of(pipe), []

    def write(place: Path) -> None:
        stock.save_pretrained(place)
        try:
            found.append(check(place, pipe))
        except ValueError:
            shutil.rmtree(place)
            raise

    write_folder(request.out, write)
    steps = steps_of(stock.scheduler, request.steps)
    print(
        f"{folder} -> {request.out}: a {type(stock).__name__} with a {type(stock.scheduler).__name__}, which diffusers loads "
        f"alone\ngreatest difference from our own samples: {found[0]:.2g} of their greatest value ({steps} steps)"
    )
    for line in _remarks(stock, request, steps):
        print(line)


def _opened(folder: Path, request: Request) -> "DiffcorePipeline":
    from diffcore.integrations.diffusers import DiffcorePipeline

    _check_ours(folder)
    opened = source(folder, Wanted(), torch.device("cpu"))
    if opened.text:
        raise ValueError(
            f"{folder} is an adapter of a pipeline that is told text, which diffusers loads into it: "
            f"pipe.load_lora_weights({str(folder)!r})"
        )
    vae: Any = None if opened.latents is None else opened.latents.vae
    return DiffcorePipeline.of(
        opened.denoiser, request.sampler, request.grid, request.steps, request.guidance, vae
    )


def _check_ours(folder: Path) -> None:
    if not is_pipeline(folder):
        return
    from diffcore.integrations.diffusers.loading.folder import read_json

    if (kind := read_json(folder / "model_index.json").get("_class_name")) != "DiffcorePipeline":
        raise ValueError(
            f"{folder} holds a {kind}, which diffusers loads as it is: there is nothing to export"
        )


def _remarks(stock: Any, request: Request, steps: int) -> list[str]:
    """What a user of the stock pipeline should know: what it takes, and what of the run is not in it."""
    name, told = type(stock.scheduler).__name__, []
    if name in ("DDIMScheduler", "DDPMScheduler"):
        told.append(
            f"ask for num_inference_steps that divide {len(stock.scheduler)}, such as {steps}: {name} is right there"
        )
    if request.guidance != CFG(1.0) and type(stock).__name__ == "ConsistencyModelPipeline":
        told.append(f"not in it: guidance {request.guidance}; its images are of the network alone")
    if request.sampler not in (DDIM(), DDPM()):
        told.append(f"not in it: sampler {request.sampler}; it takes first-order steps")
    return told
