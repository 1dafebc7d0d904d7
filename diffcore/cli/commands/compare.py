"""`diffcore compare`: samplers, numbers of evaluations and guidance rules on one network."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from diffcore.cli.arguments import join_option
from diffcore.cli.commands.sample import find_device, read_rank
from diffcore.cli.condition_files import NamedValues
from diffcore.cli.evaluation.record import (
    default_out,
    environment_facts,
    weights_facts,
    write_record,
)
from diffcore.cli.evaluation.sample_keys import labels_in_turn, sample_keys
from diffcore.cli.image_model import (
    ImageModel,
    load_guidance,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.cli.sample_request import MAXIMUM_COUNT, SampleRequest
from diffcore.evaluation.flow.comparison_table import (
    View,
    describe_case,
    describe_seconds,
    draw_guidances,
    draw_samplers,
    format_cases,
)
from diffcore.evaluation.flow.sampler_comparison import Case, SamplerComparison
from diffcore.guidance import Guidance
from diffcore.io.files import check_writable
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import describe_component, to_spec
from diffcore.samplers import DDIM, DPMSolverPP, Heun, Sampler, UniPC
from diffcore.sampling.files import SampleKey
from diffcore.sampling.generation import DEFAULT_SAMPLER
from diffcore.sampling.images import save_image
from diffcore.sampling.pictures import picture_of

__all__ = ["ComparisonRequest", "main"]

SAMPLERS: tuple[Sampler, ...] = (DEFAULT_SAMPLER, DDIM(), Heun(), DPMSolverPP("2M"), UniPC(2))
COUNTS = (5, 10, 20)
MOST_EVALUATIONS = 10_000
COMPONENTS = (
    "{0}, each as a class name, as a call such as {1}, or as {{class_path: ..., init_args: ...}}"
)
SKIPPED = {
    *("sampler", "guidance", "steps", "per_label", "n", "seeds", "image", "start", "path"),
    *("out", "arrays", "print_knots", "cache"),
}
"""Options of `diffcore sample` that a comparison sets itself."""


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared, beside samplers, numbers of evaluations and guidance rules.

    Args:
        n: number of samples of each case; from 6 on, distances have an interval.
        seed: first seed; the samples have the seeds after it.
        repeats: number of timed passes over all cases, which alternate.
        flow_steps: number of steps of the solved flow. Half as many are solved too, to estimate its
            error.
        out: folder of comparison.json and the pictures; "": comparison in the run's folder, or
            FOLDER-comparison beside a pipeline.
    """

    n: int = 16
    seed: int = 0
    repeats: int = 3
    flow_steps: int = 200
    out: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAXIMUM_COUNT:
            raise ValueError(f"n is {self.n}, expected 1 to {MAXIMUM_COUNT:,} samples")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^62")
        if not 1 <= self.repeats <= 1000:
            raise ValueError(f"repeats is {self.repeats}, expected 1 to 1000")
        if self.flow_steps < 2:
            raise ValueError(f"flow_steps is {self.flow_steps}, expected at least 2, to halve them")


def main(argv: Sequence[str]) -> None:
    """Compare samplers on the run or the pipeline that the first word names.

    Args:
        argv: command-line words after `compare`.
    """
    parser = _parser()
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    words = join_option(words, "lora", "the file of an adapter")
    words = ["CFG(1)" if word == "none" else word for word in words]
    arguments = parse_with_run_defaults(parser, words, lambda folder: _defaults(folder, parser))
    request = ComparisonRequest(
        **{name: arguments.pop(name) for name in ComparisonRequest.__dataclass_fields__}
    )
    folder, samplers, counts, rules = (
        arguments.pop(name) for name in ("run", "samplers", "steps", "guidance")
    )
    if not all(1 <= count <= MOST_EVALUATIONS for count in counts):
        raise ValueError(f"steps are {counts}, expected 1 to {MOST_EVALUATIONS:,} each")
    _compare(
        Path(folder),
        request,
        SampleRequest(**arguments),
        list(dict.fromkeys(samplers)),
        sorted(set(counts)),
        list(dict.fromkeys(rules)),
    )


def _parser() -> ComponentParser:
    """The parser of the command."""
    parser = ComponentParser(
        prog="diffcore compare",
        usage="diffcore compare RUN [--samplers NAME ...] [--steps N ...] [--guidance RULE ...] "
        "[--option value ...]",
        description="Compare samplers on the network of the run in folder RUN, or of the diffusers "
        "pipeline saved there: the distance of their samples to the accurately solved flow of the "
        "same network and guidance from the same noise, and their time. Tables are printed; "
        "comparison.json and pictures are written.",
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="folder of a run or of a diffusers pipeline"
    )
    parser.add_argument(
        "--samplers",
        type=Sampler,
        nargs="+",
        default=[to_spec(sampler) for sampler in SAMPLERS],
        help=COMPONENTS.format("samplers to compare", "'DPMSolverPP(\"3M\")'")
        + "; default: that of the run, and four common ones",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=list(COUNTS),
        help="steps, counted as evaluations of the guided network: a sampler with two evaluations "
        "in each step takes half as many steps",
    )
    parser.add_argument(
        "--guidance",
        type=Guidance,
        nargs="+",
        default=[],
        help=COMPONENTS.format("guidance rules to compare", "'CFG(3)'")
        + "; none is the network without guidance; default: that of the run",
    )
    parser.add_class_arguments(ComparisonRequest)
    parser.add_class_arguments(SampleRequest, skip=SKIPPED)
    return parser


def _defaults(folder: Path, parser: ComponentParser) -> Mapping[str, Any]:
    """The grid and kind of picture of a run; its sampler and guidance are the first compared."""
    settings = read_sampling_settings(folder)
    others = [to_spec(sampler) for sampler in SAMPLERS]
    if "sampler" in settings:
        others = [settings["sampler"], *others]
    parser.set_defaults(samplers=others, guidance=[settings.get("guidance", "CFG")])
    return {name: settings[name] for name in ("grid", "picture") if name in settings}


def _compare(
    folder: Path,
    request: ComparisonRequest,
    sampling: SampleRequest,
    samplers: Sequence[Sampler],
    counts: Sequence[int],
    rules: Sequence[Guidance],
) -> None:
    """Measure, print and write."""
    if read_rank()[1] > 1:
        raise ValueError("samplers are compared by one process: leave the launcher out")
    if sampling.threads:
        torch.set_num_threads(sampling.threads)
    out = Path(request.out or default_out(folder, "comparison"))
    check_writable(out)
    device, options = find_device(sampling.device), sampling.pipeline_options
    model = load_image_model(folder, options, device, sampling.weights)
    picture_of(model.image_process, sampling.picture)
    labels = labels_in_turn(sampling, model)
    named = NamedValues.read(sampling.condition, model.denoiser.process)
    keys = sample_keys(model, labels, named.count, request.seed, request.n)
    loaded = [load_guidance(rule, options, device) for rule in rules]
    comparison = SamplerComparison(
        model.denoiser,
        [key.seed for key in keys],
        samplers,
        counts,
        loaded,
        named.condition(keys, labels is not None),
        sampling.grid,
        min(sampling.batch_size, request.n),
        sampling.micro_batch,
        request.repeats,
        request.flow_steps,
    )
    cases = comparison.run(lambda line: print(f"diffcore: {line}", file=sys.stderr, flush=True))
    given = {id(each): rule for each, rule in zip(loaded, rules, strict=True)}
    for case in cases:  # tables name the folders of weaker networks, which are loaded
        case.guidance = given[id(case.guidance)]
    print("\n".join(format_cases(cases)))
    names = _column_names(keys, sampling, labels is not None)
    view = View(model.image_process, sampling.picture, model.decode)
    written = _write_pictures(out, cases, names, view)
    record = {
        "cases": [describe_case(case) for case in cases],
        **_describe_method(folder, request, sampling, model, keys),
        **named.settings,
        "pictures": [path.name for path in written],
        "seconds": [describe_seconds(case) for case in cases],
    }
    write_record(out / "comparison.json", record)
    print(f"results -> {out / 'comparison.json'}, pictures -> {', '.join(map(str, written))}")


def _write_pictures(
    out: Path, cases: Sequence[Case], names: Sequence[str], view: View
) -> list[Path]:
    """A picture of each rule, and one of all rules if there are several."""
    groups = [list(group) for _, group in groupby(cases, lambda c: describe_component(c.guidance))]
    images = {
        "samplers.png" if len(groups) == 1 else f"samplers-{number}.png": draw_samplers(group, view)
        for number, group in enumerate(groups, 1)
        if any(case.x is not None for case in group)
    }
    if len(groups) > 1:
        first = [[case for case in group if case.sampler == cases[0].sampler] for group in groups]
        images["guidance.png"] = draw_guidances([group[-1] for group in first], names, view)
    for name, image in images.items():
        save_image(image, out / name)
    return [out / name for name in images]


def _column_names(
    keys: Sequence[SampleKey], sampling: SampleRequest, has_labels: bool
) -> list[str]:
    """The label or prompt of each sample, or its seed."""
    if sampling.prompt:
        return [sampling.label_names[key.label] for key in keys]
    return [str(key.label) if has_labels else f"seed {key.seed}" for key in keys]


def _describe_method(
    folder: Path,
    request: ComparisonRequest,
    sampling: SampleRequest,
    model: ImageModel,
    keys: Sequence[SampleKey],
) -> dict[str, Any]:
    """Plain data on which the numbers depend, beside samplers and rules."""
    return {
        "distance": "root mean square per element, median over the samples, to the solved flow of "
        "the guided network from the same noise",
        "n": request.n,
        "seeds": f"{keys[0].seed}-{keys[-1].seed}",
        "labels": sorted({key.label for key in keys}),
        "prompts": list(sampling.prompt),
        "negative": sampling.negative,
        "adapters": list(sampling.lora),
        "grid": to_spec(sampling.grid),
        "flow_steps": request.flow_steps,
        "shape": list(model.denoiser.process.shape),
        "batch_size": min(sampling.batch_size, request.n),
        "device": str(model.denoiser.device),
        **environment_facts(),
        **weights_facts(folder, sampling.weights),
    }
