"""All checks of a training, in the order of what they cost."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffcore.doctor.data import check_items, check_labels, read_sample
from diffcore.doctor.findings import Finding
from diffcore.doctor.images import check_captions, check_files
from diffcore.doctor.resources import check_resources, check_size
from diffcore.doctor.settings import check_settings
from diffcore.doctor.training import check_training
from diffcore.training.data.image_files import ImageFiles
from diffcore.training.data.source import DataSource

if TYPE_CHECKING:
    from diffcore.training.trainer import Trainer

__all__ = ["examine_training"]

ITEMS = 2048
"""Largest number of items that are read for range, scale and duplicates."""


def examine_training(
    settings: "Trainer", quick: bool, skips_unreadable: bool = False
) -> Iterator[Finding]:
    """Examine a training before it starts. Nothing is written.

    Args:
        settings: settings of the run.
        quick: leaves out everything that trains the network.
        skips_unreadable: whether the run skips images that cannot be read.

    Yields:
        The findings, each as soon as it is known.
    """
    yield from check_settings(settings)
    yield from _check_data(settings, skips_unreadable)
    if quick or not settings.source.is_ready:
        yield from check_size(settings)
        return
    try:
        findings, state, timing = check_training(settings)
    except ValueError as error:
        yield Finding("training", "wrong", f"the training stops at its first steps: {error}.")
        return
    yield from findings
    yield from check_resources(settings, state, timing)


def _check_data(settings: "Trainer", skips_unreadable: bool) -> Iterator[Finding]:
    source, process = settings.source, settings.process
    images = getattr(source, "images", None)
    if isinstance(images, ImageFiles):
        yield from check_files(images, skips_unreadable)
    labels = None if source.labels is None else [int(label) for label in source.labels]
    if source.is_ready:
        sample = read_sample(source, process, settings.seed, ITEMS)
        yield from check_items(sample, process)
        labels = labels or sample.labels
    else:
        yield Finding(
            "items",
            "warning",
            "the latents are not cached yet, so that range, scale and training are not examined: "
            "run diffcore doctor again when `diffcore train` has cached them.",
        )
    if source.texts:
        yield check_captions(source.texts, labels or (), _tokenizers(source))
    else:
        yield from check_labels(labels or (), process, source.class_names or ())


def _tokenizers(source: DataSource) -> dict[str, Any]:
    """Tokenizers of the pipeline that encodes the captions, by their name."""
    from diffcore.training.data.latents import LatentDataset

    if not isinstance(source, LatentDataset):
        return {}
    names = sorted(name for name in source.pipeline.parts if name.startswith("tokenizer"))
    return {name: source.pipeline.read(name) for name in names}
