"""`diffcore evaluate`: compare samples of a run, a pipeline or a folder with real images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffcore.cli.arguments import extract_option, join_option
from diffcore.cli.commands.sample import find_device, read_rank
from diffcore.cli.evaluation.data import is_run, read_images
from diffcore.cli.evaluation.record import (
    default_out,
    environment_facts,
    has_data,
    weights_facts,
    write_record,
)
from diffcore.cli.evaluation.request import EvaluationRequest, check_bounds, failed_bounds
from diffcore.cli.evaluation.samples import Drawn, draw_sets, end_ranks, start_ranks
from diffcore.cli.image_model import is_pipeline, load_image_model, read_sampling_settings
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.cli.sample_request import SampleRequest
from diffcore.core.process import Process
from diffcore.evaluation.features.extractor import FeatureExtractor
from diffcore.evaluation.features.feature_table import FeatureCache
from diffcore.evaluation.features.image_set import SourceImages
from diffcore.evaluation.features.selection import load_features
from diffcore.evaluation.results import Results, draw_closest_pairs, format_results, measure
from diffcore.io.files import check_writable
from diffcore.io.parser import ComponentParser
from diffcore.io.plain_data import hash_data
from diffcore.run import AVERAGED, Run
from diffcore.sampling.images import check_image

__all__ = ["main"]

NOT_USED = {"labels", "per_label", "n", "seeds", "image", "start", "out", "path", "print_knots"}
"""Options of `diffcore sample` that an evaluation sets itself."""
RATIO = 5
"""Smallest number of images for each feature without --force."""


class _Reals(NamedTuple):
    """Real images: the reference, and the training data, which may be the same."""

    reference: SourceImages
    training: SourceImages


def main(argv: Sequence[str]) -> None:
    """Evaluate the run, the pipeline or the folder that the first word names.

    Args:
        argv: command-line words after `evaluate`.

    Raises:
        SystemExit: a bound of --require is missed (status 1).
    """
    parser = ComponentParser(
        prog="diffcore evaluate",
        usage="diffcore evaluate FOLDER [--reference DATA] [--option value ...] "
        "[--require 'METRIC<=NUMBER']",
        description="Compare images with real ones: samples of the run or of the diffusers "
        "pipeline in FOLDER, or the images in it. Samples are drawn as by `diffcore sample`, are "
        "shared by the ranks of a launcher, and continue after an interruption. The results are "
        "written to evaluation.json. --require, which may be repeated, sets a bound, as in "
        "'frechet_distance<=3x', three times the value of the training data; the exit status is 1 "
        "if one is missed.",
    )
    parser.add_argument("folder", type=str, metavar="FOLDER", help="run, pipeline or images")
    parser.add_class_arguments(EvaluationRequest)
    parser.add_class_arguments(SampleRequest, skip=NOT_USED)
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    bounds, words = extract_option(words, "require", "a bound such as label_accuracy>=0.9")
    check_bounds(bounds)
    words = ["--force=true" if word == "--force" else word for word in words]
    arguments = parse_with_run_defaults(parser, words, _read_settings)
    names = EvaluationRequest.__dataclass_fields__
    request = EvaluationRequest(**{name: arguments.pop(name) for name in names})
    folder = Path(arguments.pop("folder"))
    results = _evaluate(folder, request, SampleRequest(**arguments))
    if failed := failed_bounds(bounds, results) if results else []:
        raise SystemExit(f"diffcore evaluate: {'; '.join(failed)}")


def _read_settings(folder: Path) -> Mapping[str, Any]:
    return read_sampling_settings(folder) if _is_model(folder) else {}


def _is_model(folder: Path) -> bool:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected a run, a pipeline, or images")
    return is_pipeline(folder) or is_run(folder)


def _evaluate(folder: Path, request: EvaluationRequest, sampling: SampleRequest) -> Results:
    """Measure, print and write; no results on the ranks that only help."""
    if sampling.threads:
        torch.set_num_threads(sampling.threads)
    rank, ranks = read_rank()
    extractor = load_features(request.features, find_device(sampling.device))
    out = Path(request.out or default_out(folder))
    check_writable(out)
    if _is_model(folder):
        start_ranks(ranks)
        process, reals, drawn = _draw(folder, out, request, sampling, extractor)
    else:
        images, reals = _read_folder(folder, request, ranks)
        process, drawn = Process(shape=images.shape), Drawn([images], {"n": len(images)})
        _check_counts(request, extractor, process, len(reals.reference), len(images))
    cache = FeatureCache(extractor, out / "features")
    if ranks > 1:
        for each in (*drawn.sets, *reals):
            cache.fill(each, rank, ranks)
        end_ranks(ranks)
    if rank:
        return {}
    results, hashes = _measure(cache, drawn, reals, process, out / "closest.png", request.seed)
    method = _describe_method(request, extractor, reals, process)
    path = _record_path(folder, out, sampling)
    weights = weights_facts(folder, sampling.weights)
    write_record(path, {**results, **drawn.facts, **method, **hashes, **weights})
    print("\n".join(format_results(results)))
    print(f"results -> {path}, closest pairs -> {out / 'closest.png'}")
    return results


def _draw(
    folder: Path,
    out: Path,
    request: EvaluationRequest,
    sampling: SampleRequest,
    extractor: FeatureExtractor,
) -> tuple[Process, _Reals, Drawn]:
    """Samples of a run or a pipeline, and the real images to compare with."""
    device, options = find_device(sampling.device), sampling.pipeline_options
    model = load_image_model(folder, options, device, sampling.weights)
    process = model.image_process
    check_image(process)
    reals = _read_reals(folder, request, process)
    _check_counts(request, extractor, process, len(reals.reference), request.n)
    labels = reals.reference.labels.tolist()
    return process, reals, draw_sets(folder, out, request, sampling, model, labels)


def _read_folder(
    folder: Path, request: EvaluationRequest, ranks: int
) -> tuple[SourceImages, _Reals]:
    """The images of a folder, and the real images to compare with."""
    if request.repeats > 1 or not request.reference or ranks > 1:
        raise ValueError(
            "a folder of images has no seeds to repeat and no data of its own, and is evaluated by "
            "one rank: give --reference DATA, and leave --repeats and the launcher out"
        )
    images = read_images(str(folder), None, request.size)
    return images, _read_reals(folder, request, Process(shape=images.shape))


def _record_path(folder: Path, out: Path, sampling: SampleRequest) -> Path:
    """evaluation.json of the run for its averaged weights, which its report shows."""
    if has_data(folder) and sampling.weights == AVERAGED:
        return Run(folder).evaluation
    return out / "evaluation.json"


def _read_reals(folder: Path, request: EvaluationRequest, process: Process) -> _Reals:
    own = str(folder) if has_data(folder) else ""
    reference = request.reference or own
    if not reference:
        raise ValueError("a pipeline names no data: give real images, --reference DATA")
    training = request.training or own or reference
    images = read_images(reference, process)
    return _Reals(images, images if training == reference else read_images(training, process))


def _check_counts(
    request: EvaluationRequest,
    extractor: FeatureExtractor,
    process: Process,
    real: int,
    count: int,
) -> None:
    """Refuse numbers of images at which a Fréchet distance is mostly bias, or at which the
    covariance of the reference is singular.
    """
    blank = torch.zeros(1, *process.shape, dtype=torch.uint8)
    size = extractor(blank).features.shape[1]
    if request.force:
        return
    if count < RATIO * size:
        raise ValueError(
            f"n is {count:,}, expected at least {RATIO * size:,}, {RATIO} for each of the {size} "
            "features: a Fréchet distance of fewer is mostly bias; use more, other --features, or "
            "--force"
        )
    if real <= size:
        raise ValueError(
            f"the reference has {real:,} images, expected more than the {size:,} features, whose "
            "covariance is singular otherwise: use more, other --features, or --force"
        )


def _measure(
    cache: FeatureCache,
    drawn: Drawn,
    reals: _Reals,
    process: Process,
    picture: Path,
    seed: int,
) -> tuple[Results, dict[str, str]]:
    """All metrics, and the hashes of the images."""
    reference = cache.table(reals.reference)
    is_own = reals.training is reals.reference
    training = reference if is_own else cache.table(reals.training)
    tables = [cache.table(each) for each in drawn.sets]
    extractor = cache.extractor
    texts = [extractor.embed_texts(each) for each in drawn.prompts]
    known = [text for text in texts if text is not None]
    other = None if is_own else training
    results = measure(tables, reference, other, extractor.classes, seed, known)
    draw_closest_pairs((drawn.sets[0], tables[0]), (reals.training, training), process, picture)
    return results, {
        "samples_hash": hash_data([table.digest for table in tables]),
        "reference_hash": reference.digest,
        "training_hash": training.digest,
    }


def _describe_method(
    request: EvaluationRequest, extractor: FeatureExtractor, reals: _Reals, process: Process
) -> dict[str, Any]:
    """Plain data on which the numbers depend, beside the images."""
    return {
        "reference": f"{reals.reference.name}: {len(reals.reference)} images",
        "training": f"{reals.training.name}: {len(reals.training)} images",
        "features": extractor.name,
        "features_hash": extractor.digest,
        "resize": extractor.resizing,
        "format": "8 bits, without loss",
        "shape": list(process.shape),
        "seed": request.seed,
        **environment_facts(),
    }
