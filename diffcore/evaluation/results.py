"""The metrics of repeated sets of samples and of real images, as numbers, text and a picture."""

import statistics
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.core.process import Process
from diffcore.core.random import permutation
from diffcore.evaluation.comparison import compare, describe, fit_label_classifier
from diffcore.evaluation.features.feature_table import FeatureTable
from diffcore.evaluation.features.image_set import ImageSet
from diffcore.evaluation.neighbours import nearest_neighbours
from diffcore.sampling.images import draw_grid, save_image

__all__ = ["Results", "draw_closest_pairs", "format_results", "measure"]

PAIRS = 10
"""Number of closest pairs in the picture."""
Results = dict[str, dict[str, Any]]
"""Metric -> column -> value."""
COLUMNS = ("samples", "spread", "training_data", "reference")


def measure(
    repeats: Sequence[FeatureTable],
    reference: FeatureTable,
    training: FeatureTable | None = None,
    classes: int = 0,
    seed: int = 0,
    texts: Sequence[Tensor] = (),
) -> Results:
    """All metrics of samples, and the same metrics of real images.

    Args:
        repeats: features of sets of samples, which differ in their seeds.
        reference: features of the real images that all others are compared with.
        training: features of the training data; None if it is the reference.
        classes: number of labels that the logits predict; 0: they predict none.
        seed: seed of random directions and subsets.
        texts: embeddings (N, d) of the prompts of the samples, one matrix for each repetition;
            empty: the features are not those of CLIP, or there are no prompts.

    Returns:
        For each metric, `samples`: the mean over the repetitions; with several of them `spread`,
        their standard deviation, and `values`; `training_data`: the value of as many training
        images as there are samples; `reference`: the value of the reference, where none is needed.
    """
    real = reference if training is None else training
    classifier = None if classes else fit_label_classifier(real)
    rows = [
        compare(each, reference, seed) | describe(each, real, classifier, classes, text)
        for each, text in zip_longest(repeats, texts)
    ]
    results = {name: _summarize([row[name] for row in rows]) for name in rows[0]}
    # Not by the classifier that was fitted to them, which would recognise them.
    judge = None if training is None else classifier
    columns = {"reference": describe(reference, training, judge, classes)}
    if training is not None:
        part = _choose(training, len(repeats[0].features), seed)
        columns["training_data"] = compare(part, reference, seed) | describe(part, classes=classes)
    for column, values in columns.items():
        for name, value in values.items():
            results.setdefault(name, {})[column] = value
    return results


def _summarize(values: list[float]) -> dict[str, Any]:
    if len(values) == 1:
        return {"samples": values[0]}
    spread = statistics.stdev(values)
    return {"samples": statistics.fmean(values), "spread": spread, "values": values}


def _choose(table: FeatureTable, count: int, seed: int) -> FeatureTable:
    """As many rows of a table, chosen at random."""
    rows = permutation(seed, 0, len(table.features))[:count]
    columns = {name: value[rows] for name, value in table._asdict().items() if name != "digest"}
    return FeatureTable(**columns, digest="")


def format_results(results: Results) -> list[str]:
    """The results as a table.

    Args:
        results: result of `measure`.

    Returns:
        The lines of the table; columns without values are left out.
    """
    columns = [name for name in COLUMNS if any(name in values for values in results.values())]
    lines = [f"{'':<20}" + "".join(f"{name.replace('_', ' '):>15}" for name in columns)]
    for metric, values in results.items():
        cells = (f"{values[name]:.5g}" if name in values else "" for name in columns)
        lines.append(f"{metric.replace('_', ' '):<20}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


def draw_closest_pairs(
    samples: tuple[ImageSet, FeatureTable],
    training: tuple[ImageSet, FeatureTable],
    process: Process,
    path: str | Path,
) -> None:
    """Draw the samples that are nearest to a training image, each beside that image.

    Args:
        samples: images and their features.
        training: training images and their features.
        process: process with the range of x_0; the images fill it.
        path: image file to write. A row holds the distance, a sample, and the training image.
    """
    distance, index = nearest_neighbours(samples[1].features, training[1].features)
    closest = distance.argsort(stable=True)[:PAIRS].tolist()
    pairs = [
        images.read(range(row, row + 1))[0]
        for place in closest
        for images, row in ((samples[0], place), (training[0], int(index[place])))
    ]
    x = torch.stack(pairs).float() / 255 * (process.high - process.low) + process.low
    names = [f"{float(distance[place]):.4g}" for place in closest]
    save_image(draw_grid(x, process, names, 2), path)
