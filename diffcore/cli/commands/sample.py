"""`diffcore sample`: draw samples of a run or a diffusers pipeline by label, prompt and seed."""

import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcore.caches import cached, describe_reuse
from diffcore.cli.arguments import join_option
from diffcore.cli.condition_files import NamedValues
from diffcore.cli.image_model import (
    ImageModel,
    load_guidance,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.sample_request import IntegerList, SampleRequest
from diffcore.cli.tuned_record import parse_with_tuned_defaults
from diffcore.core.process import Process
from diffcore.guidance import Guidance, find_networks
from diffcore.io.files import hash_file
from diffcore.io.parser import ComponentParser
from diffcore.sampling import images, pictures
from diffcore.sampling.files import (
    ARRAY_SUFFIXES,
    FolderWriter,
    SampleKey,
    SampleWriter,
    WholeWriter,
    hash_networks,
    write_arrays,
)
from diffcore.sampling.generation import NonFiniteWarning, Samples, check_sampling, sample
from diffcore.sampling.loop import count_evaluations
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Level

__all__ = ["SamplePlan", "draw_samples", "find_device", "main", "read_rank"]

LAUNCHER = {"RANK": 0, "WORLD_SIZE": 1}
"""Variables that torchrun and accelerate set -> their values without a launcher."""
LINE_INTERVAL = 10.0
"""Seconds between two lines about progress where there is no terminal."""


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
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    words = join_option(words, "lora", "the file of an adapter")
    arguments, note = parse_with_tuned_defaults(parser, words, read_sampling_settings)
    arguments.pop("config", None)
    folder = Path(arguments.pop("run"))
    if note and read_rank()[0] == 0:
        print(note)
    _sample(folder, SampleRequest(**arguments))


def read_rank() -> tuple[int, int]:
    """The number of this rank and the number of ranks of the launcher.

    Returns:
        0 and 1 without a launcher.
    """
    rank, ranks = (int(os.environ.get(name) or number) for name, number in LAUNCHER.items())
    return rank, ranks


def _sample(folder: Path, request: SampleRequest) -> None:
    if request.threads:
        torch.set_num_threads(request.threads)
    rank, ranks = read_rank()
    device, options = find_device(request.device), request.pipeline_options
    model = load_image_model(folder, options, device, request.weights)
    _check_labels(request.labels, model)
    _check_out(request, model.image_process, ranks)
    plan = SamplePlan.load(model, request, device)
    keys = request.sample_keys(model.denoiser.process.classes, plan.named.count)
    plan.check(keys)
    writer = _writer(folder, request, plan, keys)
    share = keys[rank::ranks]
    wanted = writer.missing(share)
    evaluations, bad = draw_samples(plan, wanted, writer)
    writer.finish()
    name = f"rank {rank} of {ranks}: " if ranks > 1 else ""
    if rank == 0:
        print(_knot_table(plan.knots, request.print_knots))
    existing = f"{len(share) - len(wanted)} existed, " if len(wanted) < len(share) else ""
    print(
        f"{name}{existing}{len(wanted)} samples of {evaluations:g} network evaluations each, "
        f"{_planned(plan.planned_evaluations)} ({request.sampler}, {request.started_grid}, "
        f"{len(plan.knots) - 1} steps, {request.guidance}){describe_reuse(plan.denoiser)} "
        f"-> {request.out}"
    )
    if bad:
        written = "kept in" if request.out.suffix else "left out of"
        raise ValueError(
            f"{name}{len(bad)} of {len(wanted)} samples are not finite, such as that of seed "
            f"{bad[0].seed}, and {written} {request.out}: check the weights, or use less guidance, "
            "more steps or another sampler"
        )


class SamplePlan:
    """What all samples of a command have in common.

    Args:
        model: network, and the decoder of its latents.
        guidance: guidance rule with its networks.
        request: options of the command.
    """

    def __init__(self, model: ImageModel, guidance: Guidance, request: SampleRequest) -> None:
        self.model, self.guidance, self.request = model, guidance, request
        self.denoiser = cached(model.denoiser, request.cache)
        process = model.denoiser.process
        knots = request.started_grid.knots(process.schedule, request.steps)
        self.knots = insert_levels(knots, guidance.levels(process))
        self.named = NamedValues.read(request.condition, process)
        self.image: Tensor | None = None
        if request.image is not None:
            self.image = model.encode(images.load_image(request.image, model.image_process))

    @classmethod
    def load(cls, model: ImageModel, request: SampleRequest, device: torch.device) -> "SamplePlan":
        """A plan, with the weaker networks that guidance names.

        Args:
            model: network, and the decoder of its latents.
            request: options of the command.
            device: device of the networks.

        Returns:
            The plan.
        """
        guidance = load_guidance(request.guidance, request.pipeline_options, device)
        return cls(model, guidance, request)

    @property
    def planned_evaluations(self) -> int | None:
        """Number of evaluations if no rule stops early; None for an adaptive sampler."""
        process, sampler = self.model.denoiser.process, self.request.sampler
        return count_evaluations(process, sampler, self.knots, self.guidance)

    def check(self, keys: Sequence[SampleKey]) -> None:
        """Check the arguments of all samples before the first one is drawn."""
        request, process = self.request, self.model.denoiser.process
        check_sampling(
            process,
            self.knots,
            [key.seed for key in keys],
            self.named.condition(keys, bool(request.unique_labels)),
            self.guidance,
            request.batch_size,
            request.sampler,
        )

    def draw(self, keys: Sequence[SampleKey]) -> Samples:
        """Draw some samples.

        Args:
            keys: labels and seeds of the samples.

        Returns:
            The samples, with decoded x.
        """
        request = self.request
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)  # the command counts them
            samples = sample(
                self.denoiser,
                request.sampler,
                request.started_grid,
                request.steps,
                seeds=[key.seed for key in keys],
                condition=self.named.condition(keys, bool(request.unique_labels)),
                guidance=self.guidance,
                image=self.image,
                batch_size=request.batch_size,
                micro_batch=request.micro_batch,
                path=request.path,
            )
        return samples._replace(x=self.model.decode(samples.x))

    def settings(self, folder: Path) -> dict[str, Any]:
        """The settings on which a sample of given label and seed depends, apart from rounding.

        Args:
            folder: folder of the model.

        Returns:
            Plain data by name.
        """
        request, model = self.request, self.model
        networks: list[nn.Module] = [model.denoiser.network]
        networks += [x for x in find_networks(self.guidance) if isinstance(x, nn.Module)]
        if model.latents is not None:
            networks.append(model.latents.vae)
        image = "" if request.image is None else hash_file(request.image)
        return {
            "run": str(folder),
            "selected": request.weights,
            "weights": hash_networks(networks),
            "sampler": str(request.sampler),
            "grid": str(request.started_grid),
            "steps": request.steps,
            "guidance": str(request.guidance),
            "path": request.path,
            "prompts": list(request.prompt),
            "negative": request.negative,
            "adapters": list(request.lora),
            "shape": list(model.image_process.shape),
            "image": image,
            **({} if request.cache is None else {"cache": str(request.cache)}),
            **self.named.settings,
            "names": "the seed of a file and its label or prompt determine its noise",
        }


def draw_samples(
    plan: SamplePlan, keys: Sequence[SampleKey], writer: SampleWriter
) -> tuple[float, list[SampleKey]]:
    """Draw and write samples in chunks.

    Args:
        plan: what all samples have in common.
        keys: labels and seeds of the samples.
        writer: receives the samples.

    Returns:
        The mean number of evaluations for each sample, and the samples that are not finite.
    """
    size, evaluations = plan.request.batch_size, 0.0
    bad: list[SampleKey] = []
    progress = _Progress(len(keys))
    for start in range(0, len(keys), size):
        chunk = keys[start : start + size]
        samples = plan.draw(chunk)
        evaluations += samples.evaluations * len(chunk)
        finite = samples.x.flatten(1).isfinite().all(1).tolist()
        bad += [key for key, is_finite in zip(chunk, finite, strict=True) if not is_finite]
        writer.add(chunk, samples.x)
        progress.advance(len(chunk))
    progress.bar.close()
    return evaluations / max(len(keys), 1), bad


class _Progress:
    """A progress bar on a terminal; elsewhere a line every `LINE_INTERVAL` seconds.

    Args:
        total: number of samples.
    """

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, unit="sample", disable=not sys.stderr.isatty())
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.last = self.start

    def advance(self, count: int) -> None:
        """Report that further samples are written."""
        self.bar.update(count)
        self.done, now = self.done + count, time.monotonic()
        if self.bar.disable and now - self.last >= LINE_INTERVAL:
            rate, self.last = self.done / (now - self.start), now
            text = f"diffcore: {self.done} of {self.total} samples, {rate:.3g} a second"
            print(text, file=sys.stderr, flush=True)


def _planned(evaluations: int | None) -> str:
    return "as the sampler decided" if evaluations is None else f"{evaluations} planned"


def _writer(
    folder: Path, request: SampleRequest, plan: SamplePlan, keys: Sequence[SampleKey]
) -> SampleWriter:
    """The writer that the suffix of `out` requires."""
    out, process = request.out, plan.model.image_process
    if out.suffix in ARRAY_SUFFIXES:
        return WholeWriter(lambda keys, x: write_arrays(out, keys, x))
    if out.suffix in pictures.SUFFIXES:
        return WholeWriter(lambda keys, x: _write_picture(request, process, keys, x))
    condition = ("prompt" if request.prompt else "label") if request.unique_labels else ""
    writer = FolderWriter(out, process, condition, plan.settings(folder), plan.named.count > 1)
    writer.prepare(keys)
    return writer


def _write_picture(
    request: SampleRequest, process: Process, keys: Sequence[SampleKey], x: Tensor
) -> None:
    """Write the arrays, if there is a file for them, and the picture."""
    if request.arrays is not None:
        write_arrays(request.arrays, keys, x)
    columns = pictures.COLUMNS[pictures.picture_of(process, request.picture)]
    unlabelled = min(len(keys), columns.samples)
    per_row = request.per_label if request.unique_labels else unlabelled
    names = request.label_names or [""] * math.ceil(len(keys) / per_row)
    pictures.save(x, process, names, per_row, request.out, request.picture)


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


def _check_out(request: SampleRequest, process: Process, ranks: int) -> None:
    """Refuse before sampling what could not be written after it."""
    out = request.out
    suffixes = (*pictures.SUFFIXES, *ARRAY_SUFFIXES)
    if out.suffix not in (*suffixes, ""):
        raise ValueError(
            f"out is {out}, expected a file of suffix {', '.join(suffixes)}, or a folder"
        )
    if out.suffix in pictures.SUFFIXES:
        pictures.check_file(out, process, request.picture)
    if out.suffix and out.is_dir():
        raise ValueError(f"out is {out}, which is a folder")
    if not out.suffix and out.is_file():
        raise ValueError(f"out is {out}, which is a file: name a folder")
    if out.suffix and ranks > 1:
        raise ValueError(
            f"out is {out}, one file, but {ranks} ranks draw samples: use --out FOLDER"
        )


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator of this rank, or the CPU."""
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        if found is None:
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK") or 0)
        return torch.device(found.type, local % torch.accelerator.device_count())
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(
            f"device is {name!r}, which torch does not have here ({reason}): use auto or cpu"
        ) from None
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no numbers: use auto or cpu")
    return device


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
