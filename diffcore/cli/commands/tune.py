"""`diffcore tune`: the closest sampler and knots for a network, guidance and few evaluations."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffcore.cli.arguments import join_option
from diffcore.cli.commands.sample import find_device, read_rank
from diffcore.cli.condition_files import NamedValues
from diffcore.cli.evaluation.record import environment_facts, weights_facts
from diffcore.cli.evaluation.sample_keys import labels_in_turn, sample_keys
from diffcore.cli.image_model import (
    ImageModel,
    load_guidance,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.cli.sample_request import MAXIMUM_COUNT, SampleRequest
from diffcore.cli.tuned_record import TunedRecord, record_path, save_record
from diffcore.evaluation.flow.exact_flow import solve_flow
from diffcore.evaluation.flow.grid_tuning import (
    GRIDS,
    SAMPLERS,
    GridTuning,
    Tuning,
    describe_candidate,
)
from diffcore.evaluation.flow.knot_tuning import KnotProblem
from diffcore.guidance import Guidance
from diffcore.io.files import check_writable
from diffcore.io.parser import ComponentParser
from diffcore.io.specs import describe_component, to_spec
from diffcore.run import AVERAGED
from diffcore.samplers import Sampler
from diffcore.schedules import Grid

__all__ = ["TuneRequest", "main"]

MOST_EVALUATIONS = 100
SKIPPED = {
    *("sampler", "grid", "guidance", "steps", "per_label", "seeds", "image", "start", "path"),
    *("out", "arrays", "print_knots", "picture", "weights", "n", "cache"),
}
"""Options of `diffcore sample` that have no meaning for tuning."""


@dataclass(frozen=True)
class TuneRequest:
    """How knots are tuned.

    Args:
        fit: number of samples that knots are fitted to.
        held_out: number of other samples, on which the result is judged.
        seed: first seed; the fitted and then the held-out samples have the seeds after it.
        starts: number of samplers, the closest without tuning, that are tuned.
        iterations: largest number of steps of the fit of the knots, each of about as many sets of
            samples as there are evaluations; the fit of knots and coefficients has twice as many.
        history: largest number of differences of predictions that the tuned coefficients add to a
            step; 0: only knots are tuned.
        flow_steps: number of steps of the solved flow. Half as many are solved too, to estimate its
            error.
    """

    fit: int = 24
    held_out: int = 40
    seed: int = 1_000_000
    starts: int = 2
    iterations: int = 6
    history: int = 3
    flow_steps: int = 150

    def __post_init__(self) -> None:
        for name, least in (("fit", 4), ("held_out", 10)):
            value = getattr(self, name)
            if not least <= value <= MAXIMUM_COUNT:
                raise ValueError(
                    f"{name} is {value}, expected {least} to {MAXIMUM_COUNT:,} samples"
                )
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^62")
        if not 1 <= self.starts <= 100 or not 1 <= self.iterations <= 1000:
            raise ValueError(
                f"starts and iterations are {self.starts} and {self.iterations}, expected 1 to 100 "
                "and 1 to 1000"
            )
        if self.history < 0:
            raise ValueError(f"history is {self.history}, expected 0 for knots alone, or more")
        if self.flow_steps < 2:
            raise ValueError(f"flow_steps is {self.flow_steps}, expected at least 2, to halve them")


def main(argv: Sequence[str]) -> None:
    """Tune the run or the pipeline that the first word names.

    Args:
        argv: command-line words after `tune`.
    """
    parser = _parser()
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    words = join_option(words, "lora", "the file of an adapter")
    words = ["CFG(1)" if word == "none" else word for word in words]
    arguments = parse_with_run_defaults(parser, words, _defaults)
    request = TuneRequest(
        **{name: arguments.pop(name) for name in TuneRequest.__dataclass_fields__}
    )
    folder, counts, guidance, samplers, grids = (
        arguments.pop(name) for name in ("run", "evaluations", "guidance", "samplers", "grids")
    )
    if not all(2 <= count <= MOST_EVALUATIONS for count in counts):
        raise ValueError(f"evaluations are {counts}, expected 2 to {MOST_EVALUATIONS} each")
    if read_rank()[1] > 1:
        raise ValueError("one process tunes: leave the launcher out")
    _tune(
        Path(folder),
        request,
        SampleRequest(**arguments),
        guidance,
        sorted(set(counts)),
        (list(dict.fromkeys(samplers)), list(dict.fromkeys(grids))),
    )


def _parser() -> ComponentParser:
    """The parser of the command."""
    parser = ComponentParser(
        prog="diffcore tune",
        usage="diffcore tune RUN [--evaluations N ...] [--guidance RULE] [--option value ...]",
        description="Find the sampler and the knots whose samples are closest to the accurately "
        "solved flow of the network in folder RUN, a run or a diffusers pipeline, for a guidance "
        "rule and a number of evaluations. Knots and coefficients are fitted on some seeds and "
        "judged on others. "
        "`diffcore sample` and `diffcore export` then use them for these steps and this guidance.",
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="folder of a run or of a diffusers pipeline"
    )
    parser.add_argument(
        "--evaluations",
        type=int,
        nargs="+",
        default=[8],
        help="numbers of evaluations of the guided network, each tuned on its own",
    )
    parser.add_argument(
        "--guidance",
        type=Guidance,
        default="CFG",
        help="guidance rule; none is the network without guidance; default: that of the run",
    )
    for name, cls, tried in (("samplers", Sampler, SAMPLERS), ("grids", Grid, GRIDS)):
        parser.add_argument(
            f"--{name}",
            type=cls,
            nargs="+",
            default=[to_spec(each) for each in tried],
            help=f"{name} to try, each as a class name, as a call, or as {{class_path: ..., "
            "init_args: ...}}",
        )
    parser.add_class_arguments(TuneRequest)
    parser.add_class_arguments(SampleRequest, skip=SKIPPED)
    return parser


def _defaults(folder: Path) -> Mapping[str, Any]:
    """The guidance of a run."""
    settings = read_sampling_settings(folder)
    return {name: settings[name] for name in ("guidance",) if name in settings}


def _tune(
    folder: Path,
    request: TuneRequest,
    sampling: SampleRequest,
    guidance: Guidance,
    counts: Sequence[int],
    tried: tuple[Sequence[Sampler], Sequence[Grid]],
) -> None:
    """Solve the flow, tune each number of evaluations, print and write."""
    check_writable(record_path(folder, 1, guidance).parent)
    if sampling.threads:
        torch.set_num_threads(sampling.threads)
    device, options = find_device(sampling.device), sampling.pipeline_options
    model = load_image_model(folder, options, device)
    rule = load_guidance(guidance, options, device)
    named = NamedValues.read(sampling.condition, model.denoiser.process)
    labels = labels_in_turn(sampling, model)
    start = perf_counter()
    fitted, held_out = (
        _problem(model, rule, sampling, request, named, labels, offset, count)
        for offset, count in ((0, request.fit), (request.fit, request.held_out))
    )
    tuning = GridTuning(
        fitted, held_out, *tried, request.starts, request.iterations, request.history
    )
    for count in counts:
        found = tuning.tune(count, _report)
        weights = weights_facts(folder, AVERAGED).get("weights", "")
        chosen = found.chosen
        record = TunedRecord(
            chosen.sampler, chosen.grid, chosen.steps, count, guidance, found.is_better, weights
        )
        facts = _facts(found, request, sampling, perf_counter() - start)
        path = save_record(folder, record, facts)
        print(_result(found, guidance))
        print(f"{record.description} -> {path}")


def _problem(
    model: ImageModel,
    guidance: Guidance,
    sampling: SampleRequest,
    request: TuneRequest,
    named: NamedValues,
    labels: Sequence[int] | None,
    offset: int,
    count: int,
) -> KnotProblem:
    """Samples, of which the first has the seed `offset` after that of the request, with the ends of
    their flow.
    """
    _report(f"flow of {count} samples: {request.flow_steps} steps, and half as many")
    keys = sample_keys(model, labels, named.count, request.seed + offset, count)
    seeds, condition = [key.seed for key in keys], named.condition(keys, labels is not None)
    size = min(sampling.batch_size, len(keys))
    flow = solve_flow(
        model.denoiser,
        seeds,
        condition,
        guidance,
        request.flow_steps,
        batch_size=size,
        micro_batch=sampling.micro_batch,
    )
    return KnotProblem(
        model.denoiser, guidance, seeds, flow.x, condition, size, sampling.micro_batch, flow.error
    )


def _report(line: str) -> None:
    print(f"diffcore: {line}", file=sys.stderr, flush=True)


def _result(found: Tuning, guidance: Guidance) -> str:
    """The lines that compare the tuned with the untuned combination."""
    rule = describe_component(guidance)
    lines = [f"{found.evaluations} evaluations, {rule}: distance to the flow on held-out samples"]
    for title, candidate in (("untuned", found.untuned), ("tuned", found.tuned)):
        held_out = candidate.held_out
        assert held_out is not None
        lines.append(
            f"  {title:8} median {held_out.median:.3g}, 90th percentile {held_out.percentile:.3g}"
            f"  {candidate.name}"
        )
    if not found.is_better:
        lines.append("  the tuned ones are farther on held-out samples, and are not kept")
    return "\n".join(lines)


def _facts(
    found: Tuning, request: TuneRequest, sampling: SampleRequest, seconds: float
) -> dict[str, Any]:
    """How a record was found, as plain data."""
    return {
        "distance": "root mean square per element to the solved flow of the guided network",
        "untuned": describe_candidate(found.untuned),
        "tuned": describe_candidate(found.tuned),
        **to_spec(request),
        "labels": list(sampling.labels),
        "prompts": list(sampling.prompt),
        "negative": sampling.negative,
        "adapters": list(sampling.lora),
        "seconds": round(seconds, 1),
        **environment_facts(),
    }
