"""The samples of an evaluation: their labels and seeds, their folder, and the ranks that draw."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffcore.cli.commands.sample import SamplePlan, draw_samples, read_rank
from diffcore.cli.evaluation.request import EvaluationRequest, spread_labels
from diffcore.cli.image_model import ImageModel
from diffcore.cli.sample_request import IntegerList, SampleRequest
from diffcore.evaluation.features.image_set import FileImages, ImageSet
from diffcore.io.plain_data import hash_data
from diffcore.io.specs import to_spec
from diffcore.sampling.files import FolderWriter, SampleKey

__all__ = ["Drawn", "draw_sets", "end_ranks", "start_ranks", "wait_for_ranks"]


class Drawn(NamedTuple):
    """The samples of an evaluation.

    Args:
        sets: images of each repetition.
        facts: plain data that repeats them.
        prompts: prompt of each sample of each repetition; empty without prompts.
    """

    sets: Sequence[ImageSet]
    facts: dict[str, Any]
    prompts: Sequence[Sequence[str]] = ()


def draw_sets(
    folder: Path,
    out: Path,
    request: EvaluationRequest,
    sampling: SampleRequest,
    model: ImageModel,
    labels: Sequence[int],
) -> Drawn:
    """Draw this rank's share of the samples that have no file, and wait for the other ranks.

    The folder of the files is named after everything that a sample depends on beside its label
    and its seed, so that an interrupted evaluation continues, and another one starts afresh.

    Args:
        folder: folder of the model.
        out: folder in which the folder of samples is created.
        request: options of the evaluation.
        sampling: options of sampling.
        model: network, and the decoder of its latents.
        labels: labels of the reference; empty without any.

    Returns:
        The samples of all ranks.

    Raises:
        ValueError: a sample is not finite, or the options do not fit the model.
    """
    rank, ranks = read_rank()
    total = request.n * request.repeats
    chosen, rule = _choose_labels(model, sampling, labels, total)
    condition = "prompt" if sampling.prompt else "label" if rule else ""
    if condition == "label":
        sampling = replace(sampling, labels=IntegerList(sorted(set(chosen))))
    plan = SamplePlan.load(model, sampling, model.denoiser.device)
    seeds = range(request.seed, request.seed + total)
    values = plan.named.count  # of named conditions, which are read in turn
    pairs = enumerate(zip(chosen, seeds, strict=True))
    keys = [SampleKey(label, seed, index % values) for index, (label, seed) in pairs]
    plan.check(keys)
    settings = {name: value for name, value in plan.settings(folder).items() if name != "run"}
    place = out / f"samples-{hash_data(settings)[:12]}"
    writer = FolderWriter(place, model.image_process, condition, settings)
    writer.prepare(keys)
    _, bad = draw_samples(plan, writer.missing(keys[rank::ranks]), writer)
    if bad:
        raise ValueError(
            f"{len(bad)} samples are not finite, such as that of seed {bad[0].seed}: check the "
            "weights, or use less guidance, more steps or another sampler"
        )
    wait_for_ranks(ranks)
    known = torch.tensor(chosen if condition == "label" else [-1] * total)
    parts = [slice(i * request.n, (i + 1) * request.n) for i in range(request.repeats)]
    paths = [writer.path(key) for key in keys]
    texts = [sampling.prompt[label] for label in chosen] if sampling.prompt else []
    return Drawn(
        [FileImages(paths[part], known[part], "samples") for part in parts],
        {
            "n": request.n,
            "repeats": request.repeats,
            "seeds": f"{seeds[0]}-{seeds[-1]}",
            "labels": rule or "none",
            "sampler": to_spec(sampling.sampler),
            "grid": to_spec(sampling.grid),
            "steps": sampling.steps,
            "guidance": to_spec(sampling.guidance),
            **({} if sampling.cache is None else {"cache": to_spec(sampling.cache)}),
            "planned_evaluations": plan.planned_evaluations,
            "batch_size": sampling.batch_size,
            "prompts": list(sampling.prompt),
            "weights_of_networks": settings["weights"],
        },
        [texts[part] for part in parts] if texts else (),
    )


def _choose_labels(
    model: ImageModel, sampling: SampleRequest, labels: Sequence[int], total: int
) -> tuple[list[int], str]:
    """The label of each sample, and the rule as a text, which is empty without labels."""
    if model.is_text_conditioned and not sampling.prompt:
        raise ValueError("the network is conditioned on text: give prompts, --prompt TEXT")
    classes = model.denoiser.process.classes
    if sampling.prompt:
        return spread_labels(range(len(sampling.prompt)), 0, total), "prompts in equal parts"
    if not classes:
        return [0] * total, ""
    if labels and all(0 <= label < classes for label in labels):
        return spread_labels(labels, 0, total), "in the proportions of the reference"
    return spread_labels(range(classes), 0, total), "in equal parts"


def start_ranks(ranks: int) -> None:
    """Connect the ranks of a launcher.

    Args:
        ranks: number of ranks.
    """
    if ranks > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))


def end_ranks(ranks: int) -> None:
    """Wait for every rank, and close the connection that `start_ranks` opened.

    Args:
        ranks: number of ranks.
    """
    if ranks > 1:
        wait_for_ranks(ranks)
        torch.distributed.destroy_process_group()


def wait_for_ranks(ranks: int) -> None:
    """Wait until every rank has come here, however long it takes.

    Args:
        ranks: number of ranks.
    """
    if ranks > 1:
        torch.distributed.barrier()
