"""`diffcore export`: save the network of a run as a diffusers pipeline."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffcore.cli.image_model import (
    PipelineOptions,
    is_pipeline,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.tuned_record import parse_with_tuned_defaults
from diffcore.guidance import CFG, Guidance
from diffcore.io.files import write_folder
from diffcore.io.parser import ComponentParser
from diffcore.run import AVERAGED, Run
from diffcore.samplers import DDIM, DDPM, Sampler
from diffcore.sampling.generation import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.schedules import Grid

if TYPE_CHECKING:
    from diffcore.integrations.diffusers import DiffcorePipeline

__all__ = ["ExportRequest", "main"]


@dataclass(frozen=True)
class ExportRequest:
    """Which pipeline to write, and where.

    Args:
        out: folder to write. It must be new, or hold an older pipeline, which is replaced.
        format: diffcore: a DiffcorePipeline, which samples exactly as diffcore does and needs
            diffcore installed. diffusers: a pipeline class of diffusers, which needs no diffcore;
            refused if its samples would differ.
        sampler: numerical integrator that the pipeline uses by default.
        grid: rule that places the noise levels (knots) by default.
        steps: number of sampler steps that the pipeline takes by default.
        guidance: guidance rule that the pipeline uses by default.
        weights: weights of a run: averaged, raw (the trained weights in the newest checkpoint), a
            checkpoint such as step-00000400 or step-00000400/raw, or a safetensors file. The file
            weights.json in `out` holds their name.
    """

    out: Path
    format: Literal["diffcore", "diffusers"] = "diffcore"
    sampler: Sampler = field(default_factory=lambda: DEFAULT_SAMPLER)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    weights: str = AVERAGED

    def __post_init__(self) -> None:
        if self.out.exists() and not is_pipeline(self.out):
            raise ValueError(
                f"out is {self.out}, which exists and holds no pipeline: name another folder"
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


def main(argv: Sequence[str]) -> None:
    """Export the run that the first word names.

    Args:
        argv: command-line words after `export`.
    """
    parser = ComponentParser(
        prog="diffcore export",
        usage="diffcore export RUN --out FOLDER [--option value ...]",
        description="Save the averaged network of the run in folder RUN as a diffusers pipeline. "
        "The run's sampler, grid, steps and guidance replace the defaults below.",
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="folder of a run or of a DiffcorePipeline"
    )
    parser.add_class_arguments(ExportRequest)
    arguments, note = parse_with_tuned_defaults(
        parser, argv, lambda folder: read_sampling_settings(_pipeline_or_run(folder))
    )
    folder = Path(arguments.pop("run"))
    if note:
        print(note)
    _export(folder, ExportRequest(**arguments))


def _pipeline_or_run(folder: Path) -> Path:
    """The pipeline of a run, which contains its VAE too; without one, the folder itself."""
    pipeline = folder / "pipeline"
    return pipeline if is_pipeline(pipeline) else folder


def _export(folder: Path, request: ExportRequest) -> None:
    is_current = Run(folder).resolve_weights(request.weights) == AVERAGED
    origin = _pipeline_or_run(folder) if is_current else folder
    pipeline = _load_pipeline(origin, request)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    if request.format == "diffusers":
        _export_diffusers(folder, pipeline, request)
        return

    def write(path: Path) -> None:
        pipeline.save_pretrained(path)
        _record_weights(path, folder, request)

    write_folder(request.out, write)
    print(
        f"{folder} -> {request.out}: a DiffcorePipeline: load it by "
        f"diffcore.DiffcorePipeline.from_pretrained({str(request.out)!r})"
    )


def _export_diffusers(folder: Path, pipeline: "DiffcorePipeline", request: ExportRequest) -> None:
    """Write a pipeline of diffusers, after a comparison of its samples with those of diffcore."""
    from diffcore.integrations.diffusers.pipeline.export import export_pipeline
    from diffcore.integrations.diffusers.pipeline.parity import check_samples, find_exact_steps

    exported, differences = export_pipeline(pipeline), []

    def write(path: Path) -> None:
        exported.save_pretrained(path)
        differences.append(check_samples(path, pipeline))
        _record_weights(path, folder, request)

    write_folder(request.out, write)
    steps = find_exact_steps(exported.scheduler, request.steps)
    print(
        f"{folder} -> {request.out}: a {type(exported).__name__} with a "
        f"{type(exported.scheduler).__name__}, which diffusers loads alone\n"
        f"greatest difference from diffcore's samples: {differences[0]:.2g} of their greatest "
        f"value ({steps} steps)"
    )
    for line in _remarks(exported, request, steps):
        print(line)


def _record_weights(path: Path, run: Path, request: ExportRequest) -> None:
    """Write which weights of a run a pipeline holds."""
    content = {"run": str(run), "weights": request.weights}
    (path / "weights.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _load_pipeline(folder: Path, request: ExportRequest) -> "DiffcorePipeline":
    from diffcore.integrations.diffusers import DiffcorePipeline

    _check_is_diffcore_pipeline(folder)
    model = load_image_model(folder, PipelineOptions(), torch.device("cpu"), request.weights)
    if model.is_text_conditioned:
        raise ValueError(
            f"{folder} is an adapter of a text-conditioned pipeline, which diffusers loads into "
            f"it: pipe.load_lora_weights({str(folder)!r}), and a new word with "
            "pipe.load_textual_inversion"
        )
    vae: Any = None if model.latents is None else model.latents.vae
    return DiffcorePipeline.of(
        model.denoiser, request.sampler, request.grid, request.steps, request.guidance, vae
    )


def _check_is_diffcore_pipeline(folder: Path) -> None:
    if not is_pipeline(folder):
        return
    from diffcore.integrations.diffusers.loading.parts import read_json

    name = read_json(folder / "model_index.json").get("_class_name")
    if name != "DiffcorePipeline":
        raise ValueError(
            f"{folder} holds a {name}, which diffusers loads as it is: there is nothing to export"
        )


def _remarks(exported: Any, request: ExportRequest, steps: int) -> list[str]:
    """Lines for users of the exported pipeline: exact step counts, and omitted settings."""
    name, remarks = type(exported.scheduler).__name__, []
    is_multistep = name == "LCMScheduler"
    if name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler"):
        remarks.append(
            f"use a num_inference_steps that divides {len(exported.scheduler)}, such as {steps}: "
            f"{name} is exact there"
        )
    if type(exported).__name__ == "ConsistencyModelPipeline":
        remarks.append(
            f"ConsistencyModelPipeline is the pipeline of diffusers that passes class labels and "
            f"scales the input; it samples by its {name}"
            + ("" if is_multistep else ", and the network is no consistency model")
        )
    if request.guidance != CFG(1.0) and type(exported).__name__ == "ConsistencyModelPipeline":
        remarks.append(f"left out: guidance {request.guidance}; the pipeline samples without it")
    if not is_multistep and request.sampler not in (DDIM(), DDPM(), DDPM(0.0)):
        remarks.append(f"left out: sampler {request.sampler}; the pipeline takes first-order steps")
    return remarks
